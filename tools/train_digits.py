"""Train the bundled digits teacher: ResNet-8 on scikit-learn's digits, one thread, well under a minute.

    python tools/train_digits.py            writes dfqlib/assets/digits_resnet8.safetensors
    python tools/train_digits.py --check    trains again and compares with that file

With the same seed, the same version of torch and the same kind of CPU the file comes out the same to the
byte. Another kind of CPU rounds sums differently: the weights then differ slightly, the accuracy hardly.
"""

import argparse
import hashlib
import sys

import torch
import torch.nn.functional as F
from _notebooks import ROOT
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import trange

from dfqlib.data import images_and_labels, load_data
from dfqlib.models import ResNet8

FILE = ROOT / "dfqlib" / "assets" / "digits_resnet8.safetensors"
EPOCHS = 40
BATCH = 64
PEAK_LEARNING_RATE = 0.1
SHIFT = 2  # pixels


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each image (B, C, H, W) moved by up to ``pixels`` along both axes, background filling the edge."""
    height, width = images.shape[-2:]
    background = float(images.min())
    padded = F.pad(images, (pixels,) * 4, value=background)
    rows, columns = torch.randint(0, 2 * pixels + 1, (2, len(images)))
    moved = [p[:, r : r + height, c : c + width] for p, r, c in zip(padded, rows, columns, strict=True)]
    return torch.stack(moved)


def train(seed: int = 0, epochs: int = EPOCHS) -> nn.Module:
    """A trained teacher in eval mode: SGD with one learning-rate cycle, random shifts, last epoch."""
    torch.manual_seed(seed)
    images, labels = images_and_labels(load_data("digits", "train"))
    model = ResNet8().train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps)
    bar = trange(epochs, desc="digits_resnet8", unit="epoch")
    for _ in bar:
        for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(random_shift(images[batch], SHIFT)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def as_bytes(model: nn.Module) -> bytes:
    """The weights as a safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


@torch.no_grad()
def correct(model: nn.Module) -> tuple[int, int]:
    """Held-out digits the model gets right, and how many there are."""
    images, labels = images_and_labels(load_data("digits", "test"))
    return int((model(images).argmax(dim=1) == labels).sum()), len(labels)


def main() -> int:
    """Train, report, and write or compare; 1 when ``--check`` finds another file."""
    parser = argparse.ArgumentParser(description="Train the bundled digits teacher.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare with the file that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.seed)
    content = as_bytes(model)
    right, total = correct(model)
    digest = hashlib.sha256(content).hexdigest()
    print(f"{right} of {total} held-out digits, {len(content)} bytes, SHA-256 {digest}")
    if not arguments.check:
        FILE.write_bytes(content)
        return 0
    same = content == FILE.read_bytes()
    print("the same file" if same else f"differs from {FILE.name}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
