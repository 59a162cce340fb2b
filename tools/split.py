"""Move a part of the training images of every class into test/, where a folder has no test images.

    python tools/split.py mydata --fraction 0.1

What moves from mydata/train/CLASS/ to mydata/test/CLASS/ depends on the names of the files alone.
Images are moved, so that none is in both and `tas.py` needs no option that tells them apart. They
wait in mydata/test.part/ until all are there; after an interruption the same command goes on.
"""

import itertools
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from command import printable, run

def image_names(folder):
    """CLASS/FILE of all images, those that torchvision's ImageFolder finds."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    names = set()
    for path in folder.glob("*/**/*"):
        if path.name.lower().endswith(IMG_EXTENSIONS) and not path.is_dir():
            names.add(path.relative_to(folder))
    return names

def choose(names, fraction):
    """{class: (its images for training, those for testing)}."""
    chosen = {}
    for label, group in itertools.groupby(sorted(names), lambda name: name.parts[0]):
        files = list(group)
        count = max(1, round(fraction * len(files)))
        tas.require(count < len(files), f"class {label} has {len(files)} images, of which {count} "
                    "for testing would leave none for training; add some, or remove the class")
        random.Random(0).shuffle(files)
        chosen[label] = files[count:], files[:count]
    return chosen

def move(names, source, destination):
    """Move images from one folder to another, which lacks them."""
    for name in sorted(names):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(source / name, destination / name)

def split(args):
    """Make test/ and print how many images of every class are where."""
    root = Path(args.data)
    train, part = root / "train", root / "test.part"
    for name in ("test", "val"):
        tas.require(not (root / name).exists(), f"{root} has {name}/ already; nothing was moved")
    tas.open_folder(train)  # which names what is wrong with it
    for path in (train, *sorted(train.rglob("*"))):
        tas.require(not (path.is_symlink() and path.is_dir()), f"{path} is a link to a folder, out "
                    "of which images would be moved; copy that folder")
    waiting = image_names(part)  # since an interruption
    names = image_names(train)
    for name in sorted(waiting & names):
        raise tas.TASError(f"{name} is in {train} and in {part}; remove one of them")
    chosen = choose(waiting | names, args.fraction)
    testing = {name for _, names in chosen.values() for name in names}
    move(testing - waiting, train, part)
    move(waiting - testing, part, train)  # of an interruption with another fraction
    os.rename(part, root / "test")
    for label, (stay, go) in chosen.items():
        print(printable(f"{label}: {len(stay)} in train, {len(go)} in test"))
    kept = sum(len(stay) for stay, _ in chosen.values())
    print(printable(f"{root}: {kept} in train, {len(testing)} in test"))

def main(argv=None):
    """Split a folder; returns the exit status."""
    parser = tas.Parser(prog="tools/split.py", description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DIR", help="folder with the images in train/CLASS/")
    parser.add_argument("--fraction", type=tas.number(float, 0.001, 0.9), default=0.1,
                        help="of every class, for testing; at least one image (0.1)")
    return run(parser, split, argv)

if __name__ == "__main__":
    sys.exit(main())
