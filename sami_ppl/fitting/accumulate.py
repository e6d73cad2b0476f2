"""The gradient of a batch taken in equal parts, one after another: a step holds what one part needs.

    loss of a batch = mean of the losses of its parts,  ∇ loss = mean of their gradients

Parts are rows of the batch: noise levels are spread over the whole of it, and the noise, the draws of codes and the
codes that are dropped are those that the rows have where the batch is taken at once, so that the step is the same up to
the order of summation. A family of posteriors that draws with a key for every observation has draws of the same law.
Floors and capacities of the KL act on the mean of a batch, so that the KL of all parts is found first, without the
denoiser. Penalties see one part at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from numpyro import handlers
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger

from sami_ppl._util import parallel
from sami_ppl._util.parallel import Devices
from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.fitting.objective import ScoreELBO, Scores, mean_terms, scores


class PartOfBatch(Messenger):
    """Observations of model and guide are the part of this `index`, of so many equal `parts` of a batch.

    What is drawn for them is what these rows draw in the whole batch. It stands outside `handlers.seed`, whose keys it
    takes.
    """

    def __init__(self, index: Array | int, parts: int):
        self.index, self.parts = index, parts
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: draw the sites of observations, tell the decoder."""
        if msg["type"] != "sample" or not any(frame.name == "obs" for frame in msg["cond_indep_stack"]):
            return
        if isinstance(msg["fn"], ScoreDecoder):
            msg["fn"] = msg["fn"].part(self.index, self.parts)
        elif msg["value"] is None:
            # Random numbers of shape (parts, rows, …) are those of (parts · rows, …), in the same order.
            draws = msg["fn"](rng_key=msg["kwargs"]["rng_key"], sample_shape=(self.parts,))
            msg["value"] = draws[self.index]


class Accumulated(ELBO):
    """`ScoreELBO` of a batch in `parts` equal parts, in one compiled loop.

    `trained`: whether a parameter of this name is; there is a gradient of no other. `devices`: each takes its share
    of every part.
    """

    can_infer_discrete = True  # NumPyro's SVI asks

    def __init__(self, elbo: ScoreELBO, parts: int, trained: Callable[[str], bool], devices: Devices | None):
        self.elbo, self.parts, self.trained, self.devices = elbo, parts, trained, devices
        super().__init__(num_particles=1)

    def loss_with_mutable_state(
        self, rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The loss of one draw of the latents, in the form that NumPyro's SVI calls for."""
        batch = _Batch(self, rng_key, model, guide, *args, **kwargs)
        trained = {name: value for name, value in param_map.items() if self.trained(name)}
        rest = {name: value for name, value in param_map.items() if name not in trained}

        @jax.custom_vjp
        def loss(trained: Any, rest: Any) -> Array:
            return _total(batch.terms(trained | rest))

        def ahead(trained: Any, rest: Any) -> tuple[Array, Any]:
            means = batch.means(trained | rest)
            one = lambda trained, part: _total(batch.terms_of(part, trained | rest, means))  # noqa: E731
            return batch.mean(lambda part: jax.value_and_grad(one)(trained, part))

        def later(gradient: Any, cotangent: Array) -> tuple:
            return jax.tree.map(lambda leaf: cotangent * leaf, gradient), None

        loss.defvjp(ahead, later)
        return {"loss": loss(trained, rest), "mutable_state": None}

    def terms(
        self, rng_key: Key[Array, ""], param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Array]:
        """The loss by site, as `ScoreELBO.terms` has it."""
        return _Batch(self, rng_key, model, guide, *args, **kwargs).terms(param_map)


class _Batch:
    """A batch in parts, and what of it does not depend on parameters."""

    def __init__(
        self, loss: Accumulated, key: Key[Array, ""], model: Any, guide: Any, x: Any, given: Any = None, **kwargs: Any
    ):
        self.elbo, self.count, self.key = loss.elbo, loss.parts, key
        self.model, self.guide, self.kwargs = model, guide, kwargs
        self.parts = jax.tree.map(lambda leaf: parallel.split_parts(leaf, loss.parts, loss.devices), (x, given))

    def mean(self, function: Callable[[Any], Any]) -> Any:
        """The mean over parts of a tree of arrays, each a function of number and observations of a part."""
        parts = (jnp.arange(self.count), *self.parts)
        shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf / self.count, jax.lax.scan(add, zeros, parts)[0])

    def scores(self, part: Any, params: dict[str, Any], model: Any) -> Scores:
        """Terms of one part."""
        index, x, given = part
        with PartOfBatch(index, self.count):
            return scores(self.key, params, model, self.guide, x, given=given, **self.kwargs)

    def means(self, params: dict[str, Any]) -> dict[str, Array] | None:
        """The KL terms of the whole batch, without gradient; None where the loss is the mean of that of the parts."""
        if not (self.elbo.free_bits or self.elbo.capacity):
            return None
        model = handlers.block(self.model, hide=["x"])
        return jax.lax.stop_gradient(self.mean(lambda part: mean_terms(self.scores(part, params, model))))

    def terms_of(self, part: Any, params: dict[str, Any], means: dict[str, Array] | None) -> dict[str, Array]:
        """The loss of one part by site."""
        key = jax.random.fold_in(self.key, part[0])  # of penalties, which are of a part by itself
        return self.elbo.weighed(self.scores(part, params, self.model), params, key, means)

    def terms(self, params: dict[str, Any]) -> dict[str, Array]:
        """The loss by site."""
        means = self.means(params)
        return self.mean(lambda part: self.terms_of(part, params, means))


def _total(terms: dict[str, Array]) -> Array:
    return sum((jnp.sum(term) for term in terms.values()), start=jnp.zeros(()))
