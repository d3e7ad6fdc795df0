"""What takes a rank seconds to import or to find out, and is the same in all: importing this does it once for all.

No thread may start here, and no GPU may be touched: a fork could use neither.
"""

import importlib
import os

from laser_dist.observability.console import quiet_libraries

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to see that there is a GPU must not start its driver
quiet_libraries()
for _name in (
    "laser_dist.trainer",
    # What DeepSpeed imports when it makes an optimizer: torch.compile and all that it needs.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
):
    importlib.import_module(_name)
# A thousand regular expressions, which are kept.
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
if not importlib.import_module("torch").cuda.is_available():
    _ = importlib.import_module("deepspeed.ops").__compatible_ops__  # asks a compiler; and GPUs, where there are some
