"""What is planned for: a model, a batch, the machines, and one way of training on them."""

from dataclasses import dataclass, field

from laser_dist.planning.shapes import Shape

BYTES = {"bfloat16": 2, "float32": 4}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU and what connects it, per direction and GPU."""

    memory: float
    """GiB."""
    tflops: float
    """Dense bfloat16 peak with float32 accumulation, TFLOP/s."""
    hbm: float
    """GPU memory, GB/s."""
    intra: float
    """To the GPUs of its node, GB/s."""
    inter: float
    """To other nodes, GB/s."""
    host: float
    """To the memory of its host, GB/s."""
    host_memory: float
    """GiB of its host, per GPU."""


# Memory is what nvidia-smi reports; the rest is from NVIDIA's data sheets (half of a two-way NVLink figure is one way).
# inter: one 400 Gb/s adapter per GPU for the H100 and H200, 200 Gb/s for the A100, 100 Gb/s per GPU for the others,
# which also talk over PCIe inside a node. Hosts differ; 2 TiB are usual for eight GPUs, 128 GiB for one in a desktop.
GPUS = {
    "a100-40": Hardware(memory=39.6, tflops=312, hbm=1555, intra=300, inter=25, host=25, host_memory=256),
    "a100-80": Hardware(memory=79.2, tflops=312, hbm=2039, intra=300, inter=25, host=25, host_memory=256),
    "h100": Hardware(memory=79.6, tflops=989, hbm=3350, intra=450, inter=50, host=50, host_memory=256),
    "h200": Hardware(memory=140.4, tflops=989, hbm=4800, intra=450, inter=50, host=50, host_memory=256),
    "l4": Hardware(memory=22.5, tflops=121, hbm=300, intra=12, inter=12, host=12, host_memory=128),
    "rtx4090": Hardware(memory=24.0, tflops=165, hbm=1008, intra=12, inter=12, host=25, host_memory=128),
}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to split and to recompute; the fields of DeepSpeed's config are in `ds_configs/NAME.json`."""

    name: str
    """Name in ds_configs."""
    stage: int
    live: float = 0
    """ZeRO-3: parameters that stay gathered at most (stage3_max_live_parameters)."""
    offload_optimizer: str = ""
    """Where optimizer states live: "" the GPU, cpu or nvme."""
    offload_parameters: str = ""
    hpz: bool = False
    """A second copy of the weights, partitioned inside each node, serves all gathers of a step but the first."""
    bucket: float = 2e8
    """Elements reduced at a time."""
    prefetch: float = 5e7
    """ZeRO-3: elements gathered ahead of their use."""


# In the order of preference where time is equal.
STRATEGIES = (
    Strategy(name="zero2", stage=2),
    Strategy(name="zero1", stage=1),
    Strategy(name="zero0", stage=0, bucket=0),
    Strategy(name="zero3", stage=3, live=1e10),
    Strategy(name="zero3-hpz", stage=3, live=1e9, hpz=True),
    Strategy(name="zero3-lean", stage=3, live=1e9),
    Strategy(name="zero3-offload-optimizer", stage=3, live=1e9, offload_optimizer="cpu"),
    Strategy(name="zero3-offload", stage=3, live=1e9, offload_optimizer="cpu", offload_parameters="cpu"),
    Strategy(name="zero3-nvme", stage=3, live=1e9, offload_optimizer="nvme", offload_parameters="nvme"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One optimizer step on W ranks. Lengths are the longest allowed: a batch of such texts must fit."""

    shape: Shape
    hardware: Hardware = field(default=GPUS["h100"])
    gpus: int = 1
    nodes: int = 1
    queries: int = 8
    """B, per rank."""
    passages: int = 2
    """G, per query."""
    query_tokens: int = 512
    rationale_tokens: int = 511
    passage_tokens: int = 512
    soft: int = 2
    """Soft tokens per text: K - 1 under the official convention, K under the paper's."""
    dtype: str = "bfloat16"
    lora_rank: int = 0
    strategy: Strategy = STRATEGIES[0]
    checkpointing: bool = False
    chunk_tokens: int = 0
    """GradCache in chunks of at most so many tokens; 0: none."""

    @property
    def element(self) -> int:
        """Bytes of a weight or activation."""
        return BYTES[self.dtype]

    @property
    def lora(self) -> bool:
        return self.lora_rank > 0

    @property
    def trained(self) -> int:
        return self.shape.adapters(self.lora_rank) if self.lora else self.shape.parameters

    @property
    def parameters(self) -> int:
        """Adapters included."""
        return self.shape.parameters + (self.trained if self.lora else 0)

    @property
    def ranks(self) -> int:
        """W."""
        return self.gpus * self.nodes

    @property
    def rows(self) -> int:
        """R: queries and passages of one rank."""
        return self.queries * (1 + self.passages)

    @property
    def explicit_tokens(self) -> int:
        """[query ; rationale ; EOS]."""
        return self.query_tokens + self.rationale_tokens + 1

    @property
    def tokens(self) -> int:
        """T: packed tokens of one rank and step."""
        return self.queries * (self.explicit_tokens + self.passages * self.passage_tokens)

    @property
    def chunks(self) -> int:
        """Forwards with gradient per step; a row is never split."""
        if not 0 < self.chunk_tokens < self.tokens:
            return 1
        # Rows of two lengths fill a chunk to within one of the longer ones, unless it holds a single row.
        longest = max(self.explicit_tokens, self.passage_tokens)
        whole = max(self.chunk_tokens - longest, longest)
        return min(self.rows, -(-self.tokens // whole))

    @property
    def reductions(self) -> int:
        """Times that gradients are reduced in a step: with LoRA, and without ZeRO-2's and 3's partitions, once."""
        return self.chunks if self.strategy.stage >= 2 and not self.lora else 1

    @property
    def columns(self) -> int:
        """N: passages of all ranks."""
        return self.ranks * self.queries * self.passages


def resident(job: Job) -> bool:
    """Whether ZeRO-3 keeps gathered weights until backward is over, instead of gathering them for every sweep."""
    return job.strategy.stage == 3 and job.parameters <= job.strategy.live
