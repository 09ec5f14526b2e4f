"""The networks that the benchmarks time compute the same here and in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compressed
from benchmarks.cart_pole import CartPoles
from benchmarks.problems import CNN, PROBLEMS, images, labelled_texts, sentences, spoken, text, waves, windows
from dl_jax import classify, losses, privacy
from dl_jax.compress import measure, structure
from dl_jax.control import environments
from dl_jax.losses import crf
from dl_jax.models.generative.vae import VAE
from dl_jax.models.sequence.attention import TransformerLM
from dl_jax.models.sequence.rnn import GRU, LSTM, VANILLA, CharLM
from dl_jax.models.sequence.tagger import ChainTagger, Tagger
from dl_jax.models.sequence.tdnn import TDNN
from dl_jax.models.sequence.text_cnn import TextCNN
from dl_jax.models.sequence.wave_cnn import WaveCNN
from dl_jax.models.vision import lenet
from dl_jax.models.vision.mlp import MLP


@pytest.fixture(scope="module")
def torch():
    """PyTorch with one thread: its threads would spin while they wait for each other."""
    torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch, which is not installed")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def twins(torch):
    """PyTorch's networks."""
    from benchmarks import torch_nets

    return torch_nets


def shifted(model, *inputs):
    """Parameters that are nowhere zero, so that none can be forgotten."""
    variables = jax.jit(lambda: model.init(jax.random.key(0), *inputs, train=False))()
    return jax.tree.map(lambda leaf: 2 * leaf + 0.1, variables["params"])


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(lenet.LeNet5(), ()), (MLP((30, 20)), ((30, 20),)), (CNN(), ())],
    ids=["LeNet-5", "MLP", "CNN"],
)
def test_classifiers(torch, twins, model, sizes):
    image, labels = images(3)["image"], np.array([3, 0, 9])
    params = shifted(model, image)
    twin = getattr(twins, type(model).__name__)(*sizes)
    twin.load(params)
    ours = model.apply({"params": params}, image, train=False)
    theirs = twin(twins.tensor(image)).detach()
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-4)
    criteria = twins.map_loss(theirs, torch.from_numpy(labels), 10.0), lenet.map_loss(ours, jnp.array(labels), 10.0)
    np.testing.assert_allclose(*criteria, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", compressed.NETWORKS)
def test_networks_that_are_compressed(torch, name):
    """With their statistics, and at strides that divide the image."""
    pytest.importorskip("torch_pruning")
    from benchmarks import torch_compression

    model, image, draw = compressed.NETWORKS[name], images(3)["image"], np.random.default_rng(0)
    variables = jax.jit(lambda: model.init(jax.random.key(0), image, train=False))()
    variables = jax.tree.map(lambda leaf: np.asarray(leaf + 0.2 * draw.random(leaf.shape), np.float32), variables)
    twin = torch_compression.twin(name, variables)
    ours = model.apply(variables, image, train=False)
    np.testing.assert_allclose(torch_compression.predictor(twin)(image), ours, rtol=1e-4, atol=1e-4)
    if name == "ResNet-8":  # Torch-Pruning cannot follow zeros that are added as channels
        return
    groups = structure.groups(model.apply, variables, image, train=False)
    small, fewer = structure.cut(model.apply, variables, structure.lowest(groups, structure.l2(groups, variables), 0.5))
    cut = torch_compression.cut(twin, image, 0.5)
    assert small(fewer, image, train=False).shape == torch_compression.predictor(cut)(image).shape == (3, 10)
    assert measure.counts(fewer["params"]).parameters == sum(p.numel() for p in cut.parameters())


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")  # of the first layer, whose input is given
def test_private_steps(torch, twins):
    """Opacus's step without noise is that of the sum of our clipped gradients, some of which are clipped."""
    pytest.importorskip("opacus")
    from benchmarks import opacus_net

    model, batch = MLP((30,)), images(40)
    params = shifted(model, batch["image"])
    gradient = privacy.clipped_sum(classify.loss(model.apply), 1.0)
    found = jax.jit(gradient)(params, {}, {**batch, "mask": np.ones(40, np.float32)}, jax.random.key(0))
    assert 0 < (found.norms > 1).sum() < 40
    expected = jax.tree.map(lambda leaf, total: np.asarray(leaf - total / 40), params, found.total)
    twin, wanted = twins.MLP((30,)), twins.MLP((30,))
    twin.load(params)
    wanted.load(expected)
    step = opacus_net.private_step(twin, torch.optim.SGD(twin.parameters(), lr=1.0), noise=0.0, batch_size=40)
    step(twins.tensor(batch["image"]), twins.tensor(batch["label"]))
    for ours, theirs in zip(wanted.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(theirs.detach(), ours.detach(), rtol=1e-4, atol=1e-5)


def test_vae(twins):
    model, image = VAE(latents=5, hidden=(30,)), images(3)["image"]
    params = shifted(model, image)
    twin = twins.VAE(30, 5).eval()
    twin.load(params)
    for ours, theirs in zip(
        model.apply({"params": params}, image, train=False), twin(twins.tensor(image)), strict=True
    ):
        np.testing.assert_allclose(theirs.detach().flatten(1), ours.reshape(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_language_models(torch, twins, cell):
    batch = {name: column[:3, :7] for name, column in text().items()}
    model = CharLM(96, 8, layers=2, cell={"RNN": VANILLA, "GRU": GRU, "LSTM": LSTM}[cell])
    params = shifted(model, batch["token"])
    twin = twins.CharLM(getattr(torch.nn, cell), 96, 8, 2)
    twin.load(params)
    logits, _ = model.apply({"params": params}, batch["token"], train=False)
    np.testing.assert_allclose(twin(torch.from_numpy(batch["token"]).long()).detach(), logits, rtol=1e-4, atol=1e-4)
    tensors = {name: torch.from_numpy(column.copy()).long() for name, column in batch.items()}
    theirs = twins.next_character(twin, tensors).detach()
    np.testing.assert_allclose(theirs, losses.cross_entropy(logits, batch["target"]).mean(), rtol=1e-5)


@pytest.mark.parametrize("chain", [False, True])
def test_taggers(torch, twins, chain):
    batch = {name: column[:3, :7] if column.ndim > 1 else column[:3] * 0 + 7 for name, column in sentences().items()}
    model = (ChainTagger if chain else Tagger)(9000, 18, 5, 4, dropout=0)
    params = shifted(model, batch["word"])
    twin = twins.Tagger(9000, 18, 5, 4, chain=chain)
    twin.load(params)
    found = model.apply({"params": params}, batch["word"], batch["length"], train=False)
    tensors = {name: torch.from_numpy(column.copy()).long() for name, column in batch.items()}
    theirs = (twins.chain_loss if chain else twins.tagging_loss)(twin, tensors).detach()
    ours = (
        crf.negative_log_likelihood(found[0], batch["tag"], crf.Chain(*found[1]), batch["length"])
        if chain
        else losses.cross_entropy(found, batch["tag"])
    )
    np.testing.assert_allclose(theirs, ours.mean(), rtol=1e-5)


def test_networks_of_texts(torch, twins):
    pairs = (
        (TextCNN(9000, 6, 5, 4, dropout=0), twins.TextCNN(9000, 6, 5, 4), labelled_texts()["word"][:3, :7]),
        (TransformerLM(96, 8, 6, 2, 2), twins.TransformerLM(96, 8, 6, 2, 2), windows()["token"][:3, :7]),
    )
    for model, twin, tokens in pairs:
        params = shifted(model, tokens)
        twin.load(params)
        ours = model.apply({"params": params}, tokens, train=False)
        theirs = twin(torch.from_numpy(tokens.copy()).long()).detach()
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_networks_of_speech(torch, twins):
    """With their statistics."""
    pairs = (
        (WaveCNN(5, (4, 6), 8, 2), twins.WaveCNN(5, (4, 6), 8, 2), waves()["wave"][:3, :320]),
        (TDNN(5, 6), twins.TDNN(5, 6), spoken()["frames"][:3, :9]),
    )
    draw = np.random.default_rng(0)
    for model, twin, inputs in pairs:
        variables = jax.jit(lambda model=model, inputs=inputs: model.init(jax.random.key(0), inputs, train=False))()
        variables = jax.tree.map(lambda leaf: np.asarray(leaf + 0.2 * draw.random(leaf.shape), np.float32), variables)
        twin.load(variables)
        theirs = twin.eval()(torch.from_numpy(inputs)).detach()
        np.testing.assert_allclose(theirs, model.apply(variables, inputs, train=False), rtol=1e-4, atol=1e-4)


def test_poles_in_numpy_are_those_of_the_environment():
    """Step by step from the same state, until several episodes have ended; the limit truncates them too."""
    poles, draw = CartPoles(5, 0), np.random.default_rng(0)
    poles.steps[0] = 497
    step = jax.jit(jax.vmap(lambda *given: environments.step(environments.cart_pole(), *given)))
    ended = []
    for _ in range(60):
        episodes = environments.Episode(*(jnp.asarray(x) for x in (poles.state, poles.steps, poles.total)))
        action = draw.integers(0, 2, 5)
        theirs, (later, ours) = poles.step(action), step(episodes, jnp.asarray(action))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), theirs, ours)
        over = np.asarray(theirs.ended)
        np.testing.assert_allclose(poles.state[~over], np.asarray(later.state)[~over], atol=1e-5)
        assert (abs(poles.state[over]) <= 0.05).all()
        np.testing.assert_array_equal(poles.steps, np.where(over, 0, later.steps))
        np.testing.assert_array_equal(poles.total, np.where(over, 0, later.total))
        ended.append([theirs.terminated.any(), theirs.truncated.any()])
    assert np.any(ended, 0).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_takes_a_step(name):
    """The steps are traced but not run; the benchmark runs them."""
    steps = []

    def start():
        step, state = PROBLEMS[name].step()
        steps.append(step)
        return state

    state = jax.eval_shape(start)
    new, metrics = jax.eval_shape(steps[0], state, PROBLEMS[name].batch())
    assert new == state
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", PROBLEMS)
def test_its_twin_starts_at_the_same_loss_and_takes_one_too(twins, name):
    """Both losses of the VAE are negative bounds, some 784 log 2 nats."""
    batch = PROBLEMS[name].batch()
    step, state = PROBLEMS[name].step()
    _, metrics = jax.jit(step)(state, batch)
    twin = twins.TWINS[name]
    model = twin.model()
    theirs = twin.loss(model, {key: twins.tensor(column) for key, column in batch.items()})
    np.testing.assert_allclose(theirs.detach(), metrics["loss"], rtol=0.3)
    twins.train_block(name, False)(1)
