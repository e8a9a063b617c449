"""crepe-deploy: prune language models after training, ship and prove smaller, faster checkpoints.

The functions behind the commands are here: `crepe_deploy.prune(...)` and the rest of `__all__`, documented in
docs/api.md and loaded when they are first asked for, so that importing the package costs no torch. Importing it lets
`transformers.AutoModelForCausalLM.from_pretrained` load packed checkpoints. Modules here may be imported by every
folder below; they import none but `api`, `commands` and the outer folders' commands.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import hf_hook
from .errors import CrepeError

if TYPE_CHECKING:
    from .api.doctor import doctor
    from .api.evaluate import Evaluation, evaluate
    from .api.experts import experts
    from .api.export import export
    from .api.heal import heal
    from .api.inputs import Mixture
    from .api.inspect import Inspection, inspect
    from .api.plan import Plan, plan
    from .api.prune import prune, prune_and_export
    from .api.search import search
    from .api.tyr import tyr
    from .api.verify import verify
    from .store.manifest import Manifest

__version__ = "0.1.0"
__all__ = [
    "CrepeError",
    "Evaluation",
    "Inspection",
    "Manifest",
    "Mixture",
    "Plan",
    "doctor",
    "evaluate",
    "experts",
    "export",
    "heal",
    "inspect",
    "plan",
    "prune",
    "prune_and_export",
    "search",
    "tyr",
    "verify",
]

# No module or package directly in this one may have a name of these: importing it would take the name's place.
_MODULES = {
    "Evaluation": "api.evaluate",
    "Inspection": "api.inspect",
    "Manifest": "store.manifest",
    "Mixture": "api.inputs",
    "Plan": "api.plan",
    "doctor": "api.doctor",
    "evaluate": "api.evaluate",
    "experts": "api.experts",
    "export": "api.export",
    "heal": "api.heal",
    "inspect": "api.inspect",
    "plan": "api.plan",
    "prune": "api.prune",
    "prune_and_export": "api.prune",
    "search": "api.search",
    "tyr": "api.tyr",
    "verify": "api.verify",
}


def __getattr__(name: str) -> Any:
    """Load a public function or class when it is first asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'crepe_deploy' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})


hf_hook.install()
