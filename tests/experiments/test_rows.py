"""experiments/vision/rows.py: an image is read from its first row to its last."""

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.models.sequence.rnn import LSTM, Recurrent, SequenceTagger


def test_the_class_is_read_from_the_state_after_the_last_row(load_experiment):
    rows = load_experiment("vision/rows")
    image = jnp.asarray(np.random.default_rng(0).random((3, 28, 28, 1), np.float32))
    model = SequenceTagger(10, 4, cell=LSTM)
    variables = jax.jit(lambda: model.init(jax.random.key(0), image[..., 0], train=False))()
    params = variables["params"]
    _, ((h, _),) = Recurrent(LSTM, 4).apply({"params": params["Recurrent_0"]}, image[..., 0], train=False)
    (layer,) = (params[name] for name in params if name != "Recurrent_0")
    logits = rows.read(model, variables, image, train=False)
    np.testing.assert_allclose(logits, h @ layer["kernel"] + layer["bias"], atol=1e-5)
    change = jax.grad(lambda image: rows.read(model, variables, image, train=False).sum())(image)
    assert (abs(change).sum((2, 3)) > 0).all()  # every row has an effect
