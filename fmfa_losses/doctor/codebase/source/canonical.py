"""A function's result as one expression in a canonical form, so that the same equation written in two ways is equal.

Straight-line code is substituted into what is returned. `F.normalize(x, dim=1)` and `x / x.norm(dim=1, keepdim=True)`,
`torch.matmul` and `@`, functions and methods, and the order of sums and products come to the same. What is not known
makes the function unknown: nothing is guessed.

An expression is a tuple: ("param", name), ("free", text), ("const", number), or an operation and its operands.
"""

import ast
from typing import Any

from .algebra import (
    MINUS,
    Tree,
    UnknownError,
    elementwise,
    equal,
    linear,
    matmul,
    product_of,
    quotient,
    reshaped,
    size,
    sum_of,
    transposed,
    unit,
)
from .expressions import called

__all__ = ["result"]

SIZE = 3000  # nodes of an expression; substitution can grow exponentially
SAME = {"float", "double", "to", "type", "contiguous", "clone", "cuda", "cpu"}  # casts and copies
ROWWISE = {"softmax", "log_softmax"}
ELEMENTWISE = {"log", "exp", "square", "detach", "diag"}


def result(function: ast.FunctionDef, given: str | None = None) -> Tree:
    """What a function returns when its optional arguments are left out, except `given`, which is not None or False."""
    env: dict[str, Tree] = {a.arg: ("param", a.arg) for a in (*function.args.args, *function.args.kwonlyargs)}
    defaults = dict(zip([a.arg for a in function.args.args[::-1]], function.args.defaults[::-1], strict=False))
    switches = {name: name == given for name, value in defaults.items() if _is_off(value)}
    returned = _Evaluator(env, switches).run(function.body)
    if returned is None:
        raise UnknownError
    return returned


def _is_off(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)


def _attached(tree: Tree) -> Tree:
    """Without `detach`: what is made without gradient of parts without gradient is the same."""
    if tree[0] == "detach":
        return _attached(tree[1])
    return tuple(_attached(part) if isinstance(part, tuple) else part for part in tree)


class _Evaluator:
    def __init__(self, env: dict[str, Tree], switches: dict[str, bool]) -> None:
        self.env, self.switches, self.constant = env, switches, False

    def run(self, body: list[ast.stmt]) -> Tree | None:
        for node in body:
            if isinstance(node, ast.Return) and node.value is not None:
                return self(node.value)
            if isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or called(node.value) == "print"):
                continue
            if isinstance(node, (ast.Assert, ast.Pass)):
                continue
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                name = ast.Name(node.target.id, ast.Load())
                self._assign(node.target, ast.BinOp(name, node.op, node.value))
            elif isinstance(node, ast.If):
                returned = self.run(node.body if self._holds(node.test) else node.orelse)
                if returned is not None:
                    return returned
            elif isinstance(node, ast.With) and [called(i.context_expr) for i in node.items] == ["no_grad"]:
                outer, self.constant = self.constant, True
                if self.run(node.body) is not None:
                    raise UnknownError
                self.constant = outer
            else:
                raise UnknownError
        return None

    def _assign(self, target: ast.expr, node: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(node, ast.Tuple) and len(target.elts) == len(node.elts):
            values = [self(value) for value in node.elts]
            for inner, value in zip(target.elts, values, strict=True):
                self._bind(inner, value)
        else:
            self._bind(target, self(node))

    def _bind(self, target: ast.expr, value: Tree) -> None:
        if not isinstance(target, (ast.Name, ast.Attribute)) or size(value) > SIZE:
            raise UnknownError
        name = ast.unparse(target)
        self.env[name] = ("detach", _attached(value)) if self.constant else value

    def _holds(self, test: ast.expr) -> bool:
        """Whether `if flag`, `if flag is None`, `if flag != None` of an optional parameter holds."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return not self._holds(test.operand)
        if isinstance(test, ast.Name) and test.id in self.switches:
            return self.switches[test.id]
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.left, ast.Name):
            right = test.comparators[0]
            if test.left.id in self.switches and isinstance(right, ast.Constant) and right.value is None:
                none = not self.switches[test.left.id]
                return none if isinstance(test.ops[0], (ast.Is, ast.Eq)) else not none
        raise UnknownError

    # Expressions

    def __call__(self, node: ast.expr) -> Tree:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return ("const", float(node.value))
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in self.env:
            return self.env[ast.unparse(node)]
        if isinstance(node, ast.Attribute):
            return transposed(self(node.value)) if node.attr == "T" else ("free", ast.unparse(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return product_of([MINUS, self(node.operand)])
        if isinstance(node, ast.BinOp):
            return self._operation(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            return equal(self(node.left), self(node.comparators[0]))
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        if isinstance(node, ast.List):
            return ("list", *map(self, node.elts))
        if isinstance(node, ast.Call):
            return self._call(node)
        raise UnknownError

    def _operation(self, node: ast.BinOp) -> Tree:
        left, right = self(node.left), self(node.right)
        if isinstance(node.op, ast.Add):
            return sum_of([left, right])
        if isinstance(node.op, ast.Sub):
            return sum_of([left, product_of([MINUS, right])])
        if isinstance(node.op, ast.Mult):
            return product_of([left, right])
        if isinstance(node.op, ast.Div):
            return quotient(left, right)
        if isinstance(node.op, ast.MatMult):
            return matmul(left, right)
        raise UnknownError

    def _subscript(self, node: ast.Subscript) -> Tree:
        index = ast.unparse(node.slice)
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and index == "0":
            return ("rows", self(node.value.value))
        value = self(node.value)
        if index in ("(slice(None), None)", ":, None", "(:, None)"):
            return ("col", value)
        if index in ("None, :", "None", "(None, :)"):
            return transposed(("col", value))
        raise UnknownError

    def _call(self, node: ast.Call) -> Tree:
        name = called(node)
        keywords = {k.arg: k.value for k in node.keywords}
        if name is None:  # nn.CrossEntropyLoss()(logits, labels)
            return self._applied(node.func, node)
        all_gather = "gather" in name and name != "gather"  # by whatever name: torch.gather is another thing
        if isinstance(node.func, ast.Name) and node.func.id in self.env:
            return self._of_criterion(self.env[node.func.id], node)
        if name == "CrossEntropyLoss":
            return ("criterion", *self._options(keywords, node.args))
        operands = list(node.args)
        if isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
            if all_gather:
                return self._gathered(operands)
            operands = [node.func.value, *operands]
        if all_gather:
            return self._gathered(operands)
        if isinstance(node.func, ast.Name):  # a function of the codebase, which may do anything
            raise UnknownError
        return self._known(name, operands, keywords)

    def _gathered(self, operands: list[ast.expr]) -> Tree:
        if not operands:
            raise UnknownError
        return ("gather", self(operands[0]))

    def _applied(self, function: ast.expr, node: ast.Call) -> Tree:
        if isinstance(function, ast.Call) and called(function) == "CrossEntropyLoss":
            return self._of_criterion(self(function), node)
        raise UnknownError

    def _of_criterion(self, criterion: Tree, node: ast.Call) -> Tree:
        if criterion[0] != "criterion" or len(node.args) != 2 or node.keywords:
            raise UnknownError
        return ("cross_entropy", self(node.args[0]), self(node.args[1]), *criterion[1:])

    def _options(self, keywords: dict[str | None, ast.expr], positional: list[ast.expr]) -> list[Tree]:
        """Of cross_entropy: ignore_index where it is not the default."""
        options = {key: ast.unparse(value) for key, value in keywords.items()}
        reduction = options.pop("reduction", "'mean'")
        ignored = options.pop("ignore_index", "-100")
        if options or positional or reduction != "'mean'":
            raise UnknownError
        if not ignored.removeprefix("-").isdigit():  # a name
            raise UnknownError
        return [] if ignored == "-100" else [("ignore", float(ignored))]

    def _known(self, name: str, operands: list[ast.expr], keywords: dict[str | None, ast.expr]) -> Tree:
        if not operands:
            if name == "arange" and "end" in keywords:
                operands = [keywords["end"]]
            else:
                raise UnknownError
        if name == "cross_entropy" and len(operands) == 2:
            return ("cross_entropy", self(operands[0]), self(operands[1]), *self._options(keywords, []))
        if name == "arange":
            end = self(operands[-1])
            start = [ast.unparse(a) for a in operands[:-1]] or [ast.unparse(keywords.get("start", ast.Constant(0)))]
            if end[0] != "rows" or start != ["0"] or "step" in keywords:
                raise UnknownError
            return ("arange",)
        x = self(operands[0])
        rest = operands[1:]
        if name in SAME:
            return x
        if name in ("t", "transpose") and [ast.unparse(a) for a in rest] in ([], ["0", "1"], ["1", "0"]):
            return transposed(x)
        if name in ("matmul", "mm") and len(rest) == 1:
            return matmul(x, self(rest[0]))
        if name in ("reshape", "view", "unsqueeze"):
            return reshaped(x, [ast.unparse(a) for a in rest])
        if name == "eq" and len(rest) == 1:
            return equal(x, self(rest[0]))
        if name == "size" and [ast.unparse(a) for a in rest] == ["0"]:
            return ("rows", x)
        if name == "normalize":
            return unit(x, self._numbers(rest, keywords, {"p": 2, "dim": 1}))
        if name in ELEMENTWISE and not rest and not keywords:
            return elementwise(name, x)
        if name in (*ROWWISE, "sum", "mean", "norm"):
            return self._reduced(name, x, rest, keywords)
        if name == "kl_div" and len(rest) == 1:
            return self._kl_div(x, self(rest[0]), keywords)
        if name == "cat":
            return ("cat", x, *(self(a) for a in rest), *(self(v) for k, v in keywords.items() if k == "dim"))
        if name in ("one_hot", "where") and not keywords:
            return (name, x, *(self._value(a) for a in rest))
        raise UnknownError

    def _value(self, node: ast.expr) -> Tree:
        if ast.unparse(node) in ("float('-inf')", "-torch.inf", "-float('inf')"):
            return ("const", float("-inf"))
        return self(node)

    def _numbers(
        self, rest: list[ast.expr], keywords: dict[str | None, ast.expr], names: dict[str, float]
    ) -> dict[str, Any]:
        """Literal arguments by name, with their defaults."""
        found: dict[str, Any] = dict(names)
        for key, node in [*zip(names, rest, strict=False), *keywords.items()]:
            try:
                found[str(key)] = ast.literal_eval(node)
            except ValueError:
                raise UnknownError from None
        if found.keys() - names.keys():
            raise UnknownError
        if found.get("dim") == -1:  # of matrices
            found["dim"] = 1
        return found

    def _reduced(self, name: str, x: Tree, rest: list[ast.expr], keywords: dict[str | None, ast.expr]) -> Tree:
        names = {"dim": -2.0} if name in ROWWISE else {"dim": -2.0, "keepdim": False}
        if name == "norm":
            names = {"p": 2.0, "dim": -2.0, "keepdim": False}
        found = self._numbers(rest, keywords, names)
        if name == "norm" and found["p"] != 2:
            raise UnknownError
        if name in ROWWISE:
            if found["dim"] != 1:
                raise UnknownError
            return (name, x)
        if not isinstance(found["dim"], (int, float)):  # dim=[1, 2]
            raise UnknownError
        dim = int(found["dim"])
        if name == "norm":
            return ("norm", x, dim, bool(found["keepdim"]))
        return linear((name, dim), x)

    def _kl_div(self, log_p: Tree, log_q: Tree, keywords: dict[str | None, ast.expr]) -> Tree:
        options = {str(key): ast.unparse(value) for key, value in keywords.items()}
        if options != {"log_target": "True", "reduction": "'batchmean'"}:
            raise UnknownError
        difference = sum_of([log_q, product_of([MINUS, log_p])])
        return linear(("mean", -2), linear(("sum", 1), product_of([elementwise("exp", log_q), difference])))


def _is_module(node: ast.expr) -> bool:
    return ast.unparse(node) in ("torch", "F", "nn", "nn.functional", "torch.nn.functional", "functional", "torch.nn")
