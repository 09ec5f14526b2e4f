"""A set of audio that TFDS reads only with TensorFlow, and that `python -m dl_jax.data prepare` downloads without it.

As in `text_sets`, a parser stands before what is known of its source. The digests were computed from a set that had
been prepared before, and the parser was run on WAV files that were recreated from it; the download itself was not run.

`audio_scene3`, which `experiments/audio/scene.py` reads where it has been prepared, has no builder. Its clips are pairs
of recordings of `fsdd`, and seconds of URBANSOUND8K and of pyAudioAnalysis's test files. Its description does not say
which pairs were drawn and how they fill a second, where in an URBANSOUND8K file the second begins, which of its files
were taken, how they were made mono and resampled to 8 kHz, and which peaks were drawn for the clips. Without these no
builder could give the same examples.
"""

import io
import itertools
import re
import wave
from collections.abc import Mapping

import numpy as np

from dl_jax.core.errors import InputError, one_line
from dl_jax.data.builder import Example, Key
from dl_jax.data.downloads import Downloaded, Splits, Tensor

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
DIGITS = tuple("0123456789")
RATE = 8000  # samples a second
TAKES, TEST = 50, 5  # recordings of each digit by each speaker; the first of them are for the test
_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")


def digits(files: Mapping[str, bytes]) -> Splits:
    """Spoken digits, from WAV files "DIGIT_SPEAKER_NUMBER.wav" of 16 bits, one channel and 8 kHz.

    The numbers 0 to 4 are `test`, as the README of the set says. Raises InputError for another name or format.
    """
    splits: dict[str, list[tuple[Key, Example]]] = {"train": [], "test": []}
    for file, content in files.items():
        parts = _NAME.fullmatch(file)
        if not parts or parts[2] not in SPEAKERS:
            raise InputError(
                f"the file {file} is unknown, expected names such as 0_{SPEAKERS[0]}_0.wav, with a speaker of "
                f"{', '.join(SPEAKERS)}: the set has changed at its source; report it"
            )
        digit, speaker, number = parts.groups()
        example = {"audio": samples(file, content), "audio/filename": file, "label": digit, "speaker": speaker}
        splits["test" if int(number) < TEST else "train"].append((file, example))
    return splits


def samples(file: str, content: bytes) -> np.ndarray:  # -> int16 [n]
    """The samples of a WAV file of 16 bits, one channel and 8 kHz. Raises InputError for another one."""
    try:
        with wave.open(io.BytesIO(content)) as audio:
            form = audio.getnchannels(), 8 * audio.getsampwidth(), audio.getframerate()
            stated, data = audio.getnframes(), audio.readframes(audio.getnframes())
    except (wave.Error, EOFError) as e:
        raise InputError(
            f"the file {file} is no WAV file ({type(e).__name__}: {one_line(e)}): it was damaged on the way; try again"
        ) from None
    if form != (1, 16, RATE) or len(data) != 2 * stated:
        raise InputError(
            f"the file {file} has {form[0]} channels of {form[1]} bits at {form[2]} Hz and {len(data)} bytes, expected "
            f"1 channel of 16 bits at {RATE} Hz and {stated} samples: it was damaged on the way or has changed at its "
            "source; try again, or report it if it stays the same"
        )
    return np.frombuffer(data, "<i2").astype(np.int16)


_FSDD = "https://github.com/Jakobovski/free-spoken-digit-dataset"
FSDD = Downloaded(
    name="fsdd",
    version="1.0.10",
    description="Spoken digits, 50 recordings of each by six speakers, 16 bits at 8 kHz: the Free Spoken Digit "
    "Dataset. As its README says, recordings 0 to 4 are the test split.",
    homepage=_FSDD,
    licence="CC BY-SA 4.0",
    citation="Z. Jackson, C. Souza, J. Flaks, Y. Pan, H. Nicolas and A. Thite, Jakobovski/free-spoken-digit-dataset: "
    "v1.0.8, Zenodo, 2018, doi:10.5281/zenodo.1342401",
    features={"audio": Tensor((None,), np.int16), "audio/filename": str, "label": DIGITS, "speaker": SPEAKERS},
    files={
        file: (f"{_FSDD}/archive/v1.0.10.zip#free-spoken-digit-dataset-1.0.10/recordings/{file}",)
        for digit, speaker, number in itertools.product(DIGITS, SPEAKERS, range(TAKES))
        for file in [f"{digit}_{speaker}_{number}.wav"]
    },
    parse=digits,
    digests={
        "train": "dccac7591873749fa5b5d49640dd398eb984395e3ab0d3299a2ea334945bacaf",
        "test": "2f2845ca50333230be450efa2363d22436ba9805f1ec6cb4d29fd31eebc69bf4",
    },
    target=("audio", "label"),
    encoding=None,
)
