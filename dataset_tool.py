# SPDX-License-Identifier: MIT
"""Make a data set for training from images as they are, or check one.

python dataset_tool.py --source photos/ --dest photos256.zip --resolution 256x256 --transform center-crop
python dataset_tool.py inspect photos256.zip
"""

import signal
from typing import Any, NoReturn

import click

from torch_utils.errors import UserError
from training.dataset_import.convert import import_images
from training.dataset_import.plan import ImportOptions
from training.dataset_import.transforms import TRANSFORMS, parse_resolution


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--source", metavar="PATH", help="Folder or archive of images (required)")
@click.option("--dest", metavar="PATH", help="Zip, if the name ends in .zip, or folder to make (required)")
@click.option("--max-images", type=int, metavar="N", help="Take only the first N images of the source")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="How to crop; without, images are stretched")
@click.option("--resolution", metavar="WxH", help="Size to make, e.g. 256x256; without, images keep theirs")
@click.option("--labels-from-folders", is_flag=True, help="Class = first folder; names go into dataset.json")
@click.option(
    "--drop-unlabelled", is_flag=True, help="Leave out images without label, so that the others keep theirs"
)
@click.option(
    "--official", is_flag=True, help="As the papers' data: EXIF rotation ignored, grey ImageNet dropped"
)
@click.option(
    "--strict", is_flag=True, help="Stop, writing nothing, at the first image that would be dropped"
)
@click.option("--overwrite", is_flag=True, help="Replace a zip that exists")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Images converted at a time  [default: cores, up to 8]",
)
@click.pass_context
def main(context: click.Context, **flags: Any) -> None:
    """Turn images into a data set for training; or check one: dataset_tool.py inspect FILE.

    \b
    --source may be
      a folder of images, with subfolders; labels from dataset.json in it, if there is one
      a .zip of images, likewise
      cifar-10-python.tar.gz, cifar-100-python.tar.gz (fine labels)
      train-images-idx3-ubyte.gz (MNIST; labels from the file beside it)
      a folder that ends in _lmdb (LSUN)
      ImageNet: the folder with Data/CLS-LOC/train in it, or a folder of n01440764 ... folders

    \b
    --transform without: the whole picture, stretched to --resolution
      center-crop        the largest square in the middle
      center-crop-wide   a W x H band in the middle, between black bars in a W x W square
    """
    if context.invoked_subcommand is not None:
        return
    missing = [f"--{name}" for name in ("source", "dest") if not flags[name]]
    if missing:
        raise click.UsageError(
            f"{' and '.join(missing)} missing; or did you mean: dataset_tool.py inspect FILE"
        )
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        resolution = (
            parse_resolution(flags.pop("resolution")) if flags["resolution"] else flags.pop("resolution")
        )
        options = ImportOptions(resolution=resolution, num_threads=flags.pop("threads"), **flags)
        show(import_images(options).text())
    except UserError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt as error:
        raise click.ClickException(f"interrupted; {flags['dest']} was not written") from error
    finally:
        signal.signal(signal.SIGTERM, previous)


@main.command()
@click.argument("file", metavar="FILE")
@click.pass_context
def inspect(context: click.Context, file: str) -> None:
    """Check a data set: a zip, a folder or a built-in name. Exit code 0 if it can be trained on, else 1."""
    # Here because it needs torch, seconds that an import of images need not wait for.
    from training.dataset_import.inspection import inspect_dataset

    try:
        inspection = inspect_dataset(file)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    show(inspection.text())
    context.exit(0 if inspection.is_usable else 1)


def show(text: str) -> None:
    """Print, also file names that are no valid text."""
    click.echo(text.encode("utf-8", "backslashreplace").decode())


def _interrupt(signal_number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
