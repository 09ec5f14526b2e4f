"""Follows the identities of coordinates through a trace, into its loops, branches and derivatives."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from dl_jax.compress.structure.arrays import Array, anonymous, given_up, is_zero, joined, number, without
from dl_jax.compress.structure.identity import Identities
from dl_jax.compress.structure.rules import apply_rule
from dl_jax.core import equations


class Body(NamedTuple):
    """What is known of the arrays of a jaxpr, to run it without some of the identities."""

    jaxpr: Any
    arrays: dict[Any, Array]  # by the jaxpr's variables
    inner: dict[Any, tuple["Body", ...]]  # bodies of loops, branches and derivatives, by an equation's first output

    def within(self, equation: Any) -> tuple["Body", ...]:
        """The bodies of an equation; none for an operation."""
        return self.inner.get(equation.outvars[0], ()) if equation.outvars else ()

    @property
    def outputs(self) -> list[Array]:
        return [self.of(atom) for atom in open_jaxpr(self.jaxpr).outvars]

    def of(self, atom: Any) -> Array:
        return number(atom.val) if isinstance(atom, jex.Literal) else self.arrays[atom]


# (identities, equation, inputs, whether rules of derivatives are followed) -> outputs and inner bodies
Control = Callable[[Identities, Any, list[Array], bool], tuple[list[Array], tuple[Body, ...]]]


def open_jaxpr(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def constants(jaxpr: Any) -> list[tuple[Any, Any]]:
    """The variables of a jaxpr that stand for constants, with these."""
    return list(zip(open_jaxpr(jaxpr).constvars, getattr(jaxpr, "consts", ()), strict=True))


def follow(ids: Identities, jaxpr: Any, inputs: Sequence[Array], rules: bool = True) -> Body:
    """What is known of all arrays of a jaxpr whose inputs are known.

    With `rules`, also of those of derivatives that functions have of their own. A rule usually calls its function
    again, so those within a rule are not followed: second derivatives are those of the bodies.
    """
    body = Body(jaxpr, dict(zip(open_jaxpr(jaxpr).invars, inputs, strict=True)), {})
    for variable, value in constants(jaxpr):
        body.arrays[variable] = anonymous(ids, jax.typeof(value), zero=is_zero(value))
    for equation in open_jaxpr(jaxpr).eqns:
        ins = [body.of(atom) for atom in equation.invars]
        control = CONTROL.get(equation.primitive.name)
        outs, inner = control(ids, equation, ins, rules) if control else (apply_rule(ids, equation, ins), ())
        body.arrays.update(zip(equation.outvars, outs, strict=True))
        if inner:
            body.inner[equation.outvars[0]] = inner
    return body


def unshared(jaxpr: Any) -> Any:
    """A jaxpr in which every use of an array that repeats one number, such as zeros, has an array of its own.

    Otherwise layers that begin with the same zeros, as the states of recurrent networks do, could not shrink apart.
    """

    def operation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
        own = [x() if callable(x) else x for x in inputs]
        if equation.primitive.name == "broadcast_in_dim" and isinstance(equation.invars[0], jex.Literal):
            return [lambda: equations.bound(equation, own)[0]]
        return equations.bound(equation, own)

    def copied(*inputs: Any) -> list[Any]:
        return [x() if callable(x) else x for x in equations.evaluate(jaxpr, inputs, operation)]

    return jax.make_jaxpr(copied)(*jaxpr.in_avals)


def _scan(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    params = equation.params
    constant, states = equations.scanned(equation)
    carried = constant + states
    for x in ins[carried:]:
        ids.freeze(x.axes[0], "the steps of a loop")
    rows = [without(x, [0]) for x in ins[carried:]]
    body, carry = _iterated(ids, params["jaxpr"], ins[:constant], ins[constant:carried], rows, rules)
    outputs = [Array(("the steps of a loop", *y.axes), (False, *y.zero)) for y in body.outputs[states:]]
    return [*carry, *outputs], (body,)


def _while(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    body, carry = _iterated(ids, params["body_jaxpr"], ins[first:second], ins[second:], [], rules)
    return carry, (follow(ids, params["cond_jaxpr"], [*ins[:first], *carry], rules), body)


def _iterated(
    ids: Identities, jaxpr: Any, before: list[Array], carry: list[Array], after: list[Array], rules: bool
) -> tuple[Body, list[Array]]:
    """The body of a loop, and what it carries: repeated until what it takes is what it gives."""
    while True:
        body = follow(ids, jaxpr, [*before, *carry, *after], rules)
        met = [joined(ids, pair) for pair in zip(carry, body.outputs[: len(carry)], strict=True)]
        new = [Array(tuple(axes), tuple(zero)) for axes, zero in met]
        if all(map(_alike, carry, new)):
            return body, new
        carry = new


def _alike(one: Array, other: Array) -> bool:
    kinds = ([isinstance(axis, str) for axis in array.axes] for array in (one, other))
    return next(kinds) == next(kinds) and one.zero == other.zero


def _cond(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
    bodies = tuple(follow(ids, branch, ins[1:], rules) for branch in equation.params["branches"])
    met = [joined(ids, each) for each in zip(*(body.outputs for body in bodies), strict=True)]
    return [Array(tuple(axes), tuple(zero)) for axes, zero in met], bodies


def is_real(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def reals(equation: Any) -> tuple[Callable[..., Any], list[bool]]:
    """An equation as a function (inputs, the real ones of them) -> outputs, and which inputs are real."""
    real = [is_real(variable) for variable in equation.invars]

    def of_reals(inputs: Sequence[Any], some: Sequence[Any]) -> list[Any]:
        remaining = iter(some)
        return list(equations.bound(equation, [next(remaining) if r else x for r, x in zip(real, inputs, strict=True)]))

    return of_reals, real


def chosen(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [value for value, yes in zip(values, mask, strict=True) if yes]


def _custom(derivative: Callable[..., tuple[list[Array], tuple[Body, ...]]]) -> Control:
    """Follows a function with derivatives of its own, and by `derivative` the rule of these."""

    def followed(ids: Identities, equation: Any, ins: list[Array], rules: bool) -> tuple[list[Array], tuple[Body, ...]]:
        if not all(map(is_real, equation.outvars)):
            return given_up(ids, equation, ins, "a custom derivative of numbers that are not real"), ()
        body = follow(ids, equations.inlined(equation.params["call_jaxpr"]), ins, rules)
        return derivative(ids, equation, ins, body) if rules else (body.outputs, (body,))

    return followed


def _of_jvp(ids: Identities, equation: Any, ins: list[Array], body: Body) -> tuple[list[Array], tuple[Body, ...]]:
    """The function, and the rule of its derivative: (inputs, tangents of the real ones) -> (outputs, tangents)."""
    of_reals, real = reals(equation)

    def rule(inputs: list[Any], tangents: list[Any]) -> Any:
        return jax.jvp(lambda *some: of_reals(inputs, some), tuple(chosen(inputs, real)), tuple(tangents))

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    traced = equations.inlined(jax.make_jaxpr(rule)(avals, chosen(avals, real)))
    derivative = follow(ids, traced, [*ins, *chosen(ins, real)], rules=False)
    met = [joined(ids, each) for each in zip(body.outputs * 2, derivative.outputs, strict=True)]
    outs = [Array(tuple(axes), tuple(zero)) for axes, zero in met[: len(body.outputs)]]
    return outs, (body, derivative)


def _of_vjp(ids: Identities, equation: Any, ins: list[Array], body: Body) -> tuple[list[Array], tuple[Body, ...]]:
    """The function; the forward pass to (outputs, residuals); the backward pass (residuals, gradients) -> gradients."""
    of_reals, real = reals(equation)

    def forward(*inputs: Any) -> Any:
        return jax.vjp(lambda *some: of_reals(inputs, some), *chosen(inputs, real))

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    traced, (outputs, pull) = jax.make_jaxpr(forward, return_shape=True)(*avals)
    residuals, tree = jax.tree.flatten(pull)
    pulled = jax.make_jaxpr(lambda residuals, grads: jax.tree.unflatten(tree, residuals)(grads))(residuals, outputs)
    ahead = follow(ids, equations.inlined(traced), ins, rules=False)
    met = [joined(ids, each) for each in zip(body.outputs, ahead.outputs[: len(outputs)], strict=True)]
    outs = [Array(tuple(axes), tuple(zero)) for axes, zero in met]
    back = follow(ids, equations.inlined(pulled), [*ahead.outputs[len(outputs) :], *outs], rules=False)
    for one, other in zip(chosen(ins, real), back.outputs, strict=True):
        joined(ids, [one, other])
    return outs, (body, ahead, back)


CONTROL: dict[str, Control] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom(_of_jvp),
    "custom_vjp_call": _custom(_of_vjp),
}
