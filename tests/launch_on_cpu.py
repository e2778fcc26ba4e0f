"""`flashsloth` under FSDP2 or DeepSpeed on processes without a GPU.

accelerate shards on GPUs only and falls back to plain data parallelism elsewhere. This launcher tells it that the
CPU is such a device, talking over gloo; everything after that is the code that runs on GPUs.
"""

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

import flashsloth.train.run  # noqa: E402, F401
import flashsloth.train.trainer as trainer  # noqa: E402
from flashsloth_cli.main import main  # noqa: E402

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
trainer.uses_cpu = flashsloth.train.run.uses_cpu = lambda: False
sys.exit(main())
