"""sami_ppl: score-based autoencoders as probabilistic programs."""

from importlib.metadata import version as _version

import lazy_loader as _lazy

__version__ = _version("sami_ppl")

# The public names stand in __init__.pyi. Each is imported when it is first used: `import sami_ppl` and `sami --help`
# wait for no JAX.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
