"""`python -m dl_jax.data prepare NAME` and `python -m dl_jax.data list`."""

import sys
from typing import Annotated

import tyro

from dl_jax.core.errors import InputError, exit_status
from dl_jax.data.prepare import prepare
from dl_jax.data.source import BUNDLED, DERIVED, DOWNLOADED, Prepared, data_folder, prepared, split_sizes


def prepare_set(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")], data_dir: str | None = None
) -> None:
    """Download and prepare a data set, in array_record format.

    Args:
        name: TFDS name of the data set, such as mnist or glue/sst2, or one of those that `list` names beside TFDS's.
        data_dir: Folder to prepare the data set in [default: $TFDS_DATA_DIR, else ~/tensorflow_datasets].
    """
    print(_summary(prepare(name, data_dir)))


def list_sets(data_dir: str | None = None) -> None:
    """List the prepared data sets.

    Args:
        data_dir: Folder or gs:// address to look in [default: $TFDS_DATA_DIR, else ~/tensorflow_datasets].
    """
    found = prepared(data_dir)
    print(
        f"{len(found)} prepared in {data_folder(data_dir)}; always available: {', '.join(BUNDLED)}; "
        f"beside TFDS's sets, `prepare` knows {', '.join([*DOWNLOADED, *DERIVED])}"
    )
    for each in found:
        print(_summary(each))


def _summary(found: Prepared) -> str:
    try:
        splits = ", ".join(f"{split} {size}" for split, size in split_sizes(found).items())
    except InputError as e:
        splits = str(e)
    return f"{found.name} {found.version}: {splits}"


def main() -> int:
    commands = {"prepare": prepare_set, "list": list_sets}
    return exit_status(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m dl_jax.data"))


if __name__ == "__main__":
    sys.exit(main())
