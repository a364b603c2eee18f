"""fxrpg: models whose weights are generated from a few free numbers."""

import importlib
import logging
import pkgutil

for _folder in ("generators", "kernels"):  # each file registers itself: a method, a layer
    _package = importlib.import_module(f"fxrpg.{_folder}")
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

from fxrpg.api import materialize, transform  # noqa: E402
from fxrpg.channels import prune_channels  # noqa: E402
from fxrpg.checkpoint import load, save  # noqa: E402
from fxrpg.compact import freeze, prune, quantize, truncate  # noqa: E402
from fxrpg.delta import apply_delta, delta  # noqa: E402
from fxrpg.discovery import announce as _announce  # noqa: E402
from fxrpg.distributed import distribute  # noqa: E402
from fxrpg.errors import FxrpgError  # noqa: E402
from fxrpg.explain import explain  # noqa: E402
from fxrpg.fit import fit  # noqa: E402
from fxrpg.generators.pemn import Pemn  # noqa: E402
from fxrpg.generators.pranc import Pranc  # noqa: E402
from fxrpg.generators.ring import Ring  # noqa: E402
from fxrpg.ledger import ledger  # noqa: E402
from fxrpg.lowering import lowering_mode  # noqa: E402
from fxrpg.parameter_groups import parameter_groups  # noqa: E402
from fxrpg.pretrained import from_pretrained, save_pretrained  # noqa: E402
from fxrpg.recurrence import unroll  # noqa: E402
from fxrpg.rule import Rule  # noqa: E402
from fxrpg.training import PrancTrainer  # noqa: E402
from fxrpg.version import __version__  # noqa: E402

_announce()
logging.getLogger("fxrpg").addHandler(logging.NullHandler())

__all__ = [
    "FxrpgError",
    "Pemn",
    "Pranc",
    "PrancTrainer",
    "Ring",
    "Rule",
    "__version__",
    "apply_delta",
    "delta",
    "distribute",
    "explain",
    "fit",
    "freeze",
    "from_pretrained",
    "ledger",
    "load",
    "lowering_mode",
    "materialize",
    "parameter_groups",
    "prune",
    "prune_channels",
    "quantize",
    "save",
    "save_pretrained",
    "transform",
    "truncate",
    "unroll",
]
