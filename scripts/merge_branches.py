"""Merge the two branches of a checkpoint of RCIL: the same predictions from a network with half as many 3×3 convs.

    python scripts/merge_branches.py checkpoints/step/15-5s-voc_RCIL_5.pth rcil.pth
    python scripts/predict.py rcil.pth pictures/
    python run.py --dataset voc --task 15-5s --overlap --step 5 --method RCIL --rcil_network merged --test --ckpt rcil.pth

The merged network cannot be trained further: the next step and its teacher need both branches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from methods.rcil import DOUBLED, MERGED, layers_of  # noqa: E402  (the project is run from its folder, not installed)
from scripts.predict import load  # noqa: E402
from utils.checkpointing import checkpoint_files  # noqa: E402
from utils.checkpointing.store import read  # noqa: E402
from utils.errors import UserError  # noqa: E402

#: Keys that a test, a prediction and a report need; momenta and the states of methods are left out.
KEPT = ("epoch", "best_score", "history", "iterations", "options", "task")


def merge(path: Path, target: Path) -> None:
    """Write the merged checkpoint.

    Args:
        path: of a finished step of RCIL.
        target: the new file; its folder is created.

    Raises:
        UserError: no checkpoint of RCIL, or the same file twice.
    """
    if target.resolve() == path.resolve():
        raise UserError(f"{target} is the checkpoint itself, which the next step needs; name another file")
    state = read(path)
    network = state.get("options", {}).get("rcil_network")
    if network != DOUBLED:
        raise UserError(
            f"{path} was trained with --rcil_network {network}: it does not have two branches; name a checkpoint of RCIL"
        )
    model = load(path).model
    for layer in layers_of(model).values():
        layer.make_plain()
    content = {key: state[key] for key in KEPT if key in state}
    content["options"] = content["options"] | {"rcil_network": MERGED}
    content["model_state"] = checkpoint_files.with_prefix(model.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_files.save(target, content)


def main(argv: list[str] | None = None) -> int:
    """Merge one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a finished step of RCIL")
    parser.add_argument("out", type=Path, help="file of the merged checkpoint")
    arguments = parser.parse_args(argv)
    try:
        merge(arguments.checkpoint, arguments.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.checkpoint} -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
