"""PyTorch trains from the buffer: any framework can, by reading files.

python3 runtime_preprocessing.py --epoch_start=0 --epoch_end=2 --batch_size=32 &
python3 tests/examples/pytorch_reader.py /dev/shm/batches
"""

import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

folder = Path(sys.argv[1])
while not (folder / "buffer.json").exists():
    time.sleep(0.1)
info = json.loads((folder / "buffer.json").read_text())
lock = open(folder / ".trainer.lock", "w")  # noqa: SIM115  (held until the end)
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another training uses the buffer


def needs(epoch: int, batch: int) -> None:
    """Tells runtime_preprocessing.py what to keep ready. The file must appear whole: rename it."""
    (folder / "progress.new").write_text(f"{epoch}\n{batch}\n")
    (folder / "progress.new").rename(folder / "training_progress.txt")


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for epoch in range(*info["epochs"]):
        for batch in range(info["batches_per_epoch"]):
            needs(epoch, batch)
            while not (folder / f"X_{epoch}_{batch}.npy").exists():
                time.sleep(0.01)
            images, labels = (np.load(folder / f"{kind}_{epoch}_{batch}.npy") for kind in "XY")
            yield torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(labels)
    needs(info["epochs"][1], 0)  # it ends, and leaves the folder clean


network = torch.nn.Sequential(  # or torchvision.models.resnet50(num_classes=info["classes"])
    torch.nn.Conv2d(3, 32, 7, stride=4), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
    torch.nn.MaxPool2d(4), torch.nn.Conv2d(32, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1),
    torch.nn.Flatten(), torch.nn.Linear(64, info["classes"]),
)  # fmt: skip
optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
for step, (images, labels) in enumerate(batches()):
    loss = torch.nn.functional.cross_entropy(network(images), labels.long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"trained {step + 1} steps, last loss {loss.item():.3f}")
