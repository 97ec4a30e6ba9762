"""An interpreter of MindIR graphs in Torch: evidence that a graph which cannot run here computes what it should.

`graph` reads a file into nodes, `values` are what flows between them, `rules` says what a rule is, and
`elementwise`, `norms`, `shaping`, `selection`, `products`, `experts` and `attention` (with `masks`) are the rules of
MindSpore's operators, `cpu_operators` those of the project's own library, `witnesses` says who bears them out. `parameters` are weights and caches, `interpreter` runs it all, with
`noise` if asked to.
"""

from .errors import InterpreterError
from .graph import Graph, load_graph, read_graph
from .interpreter import Interpreter
from .noise import Noise

__all__ = ["Graph", "Interpreter", "InterpreterError", "Noise", "load_graph", "read_graph"]
