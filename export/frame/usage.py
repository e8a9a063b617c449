"""How a folder is loaded and served, in Markdown for its card; `MODEL` and `INSTALL` are filled in by the card."""

from __future__ import annotations

from typing import Final

_LOAD: Final = """\
```python
{before}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```"""
PLAIN: Final = f"""\
Any reader of Hugging Face checkpoints:

{_LOAD.format(before="")}

```
vllm serve MODEL
```"""
CODED: Final = f"""\
Install crepe-deploy first; without it readers say that they do not know this kind of model, and refuse it:

```
pip install "INSTALL"
```

{_LOAD.format(before="import crepe_deploy  # makes transformers read it" + chr(10))}"""
OURS: Final = f"""\
{CODED}

```
crepe-deploy serve MODEL   # or: vllm serve MODEL, which finds crepe-deploy by itself
```"""
INT8: Final = f"""\
vLLM runs it as it is; transformers needs one more package:

```
vllm serve MODEL
pip install compressed-tensors
```

{_LOAD.format(before="")}"""
ONNX: Final = """\
```
pip install "INSTALL_ONNX"
crepe-deploy serve MODEL   # a local folder
```"""
DECI: Final = """\
```
vllm serve MODEL --trust-remote-code
```"""
GGUF: Final = """\
llama.cpp and what is built on it (llama-server, Ollama, LM Studio) take the file:

```
llama-cli -m MODEL/model.gguf -p "The capital of France is"
llama-server -m MODEL/model.gguf   # an OpenAI server
```

In Python, after `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("MODEL/model.gguf")   # from the hub: Llama.from_pretrained("MODEL", filename="model.gguf")
print(model("The capital of France is", max_tokens=24)["choices"][0]["text"])
```"""
