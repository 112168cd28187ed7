"""The sections of a run's JSON file as frozen pydantic models. No torch: `--dry-run` and the planner import only this.

Facts are written once: what follows from other values (degrees, accumulation steps, DeepSpeed's batch keys) is
computed in `resolve.py`, never configured.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

# Upper bounds: far above any model or machine, and low enough that checking and planning take no time or memory that
# grows with a number, and that every value fits what torch and the operating system hold it in.
WIDTH = 1 << 20
LAYERS = 10_000
LOOPS = 4096
IDS = 2**31 - 1
TOKENS = 1 << 24
STEPS = 10**12
RATE = 1e6
PROCESSES = 10_000_000
SECONDS = 2_000_000  # 23 days: milliseconds that fit 32 bits

NO_VALIDATION = "none"
IGNORED_LABEL = -100
"""The label, or target, that does not count, as in transformers and torch's cross-entropy."""
ActivationCheckpointing = Literal["none", "layer", "loop"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RopeScaling(Section):
    """How RoPE is stretched beyond the length it was first trained with; keys and meaning as in Hugging Face's
    `rope_parameters`."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: arXiv 2306.15595; llama3: that of Llama 3.1; yarn: arXiv 2309.00071."
    )
    factor: float = Field(ge=1, le=RATE, description="By how much; positions, or low frequencies, are divided by it.")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, le=TOKENS, description="llama3 and yarn: the length before it was stretched."
    )
    low_freq_factor: float | None = Field(
        None, gt=0, le=RATE, description="llama3: longer waves are divided by the factor."
    )
    high_freq_factor: float | None = Field(None, gt=0, le=RATE, description="llama3: shorter waves stay as they are.")
    beta_fast: float | None = Field(None, gt=0, le=RATE, description="yarn: turns above which a wave stays; null = 32.")
    beta_slow: float | None = Field(
        None, gt=0, le=RATE, description="yarn: turns below which a wave is divided; null = 1."
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        le=RATE,
        description="yarn: factor on queries and keys; null = from the factor, or mscale / mscale_all_dim.",
    )
    mscale: float | None = Field(None, gt=0, le=RATE, description="yarn: of attention_factor, where that is null.")
    mscale_all_dim: float | None = Field(
        None, gt=0, le=RATE, description="yarn: of attention_factor, where that is null."
    )
    truncate: bool | None = Field(None, description="yarn: round the bounds between the waves; null = true.")


class ModelConfig(Section):
    """A recurrent-depth mixture-of-experts transformer: prelude, looped block, coda."""

    vocab_size: int = Field(ge=2, le=IDS, description="Rows of the embedding; at least the tokenizer's pieces.")
    dim: int = Field(ge=8, le=WIDTH, description="Width of the residual stream.")
    prelude_layers: int = Field(ge=1, le=LAYERS, description="Dense layers run once before the loop.")
    recurrent_layers: int = Field(ge=1, le=LAYERS, description="Distinct MoE layers in the looped block.")
    coda_layers: int = Field(ge=0, le=LAYERS, description="Dense layers run once after the loop.")
    max_loops: int = Field(ge=1, le=LOOPS, description="Largest loop count drawn in training.")
    mean_recurrence: int = Field(ge=1, le=LOOPS, description="Mean loop count of training; 'T' in evaluation.")

    attn_type: Literal["mla", "gqa"] = "mla"
    n_heads: int = Field(ge=1, le=WIDTH)
    n_kv_heads: int | None = Field(None, ge=1, le=WIDTH, description="GQA only: key/value heads; null = n_heads.")
    head_dim: int | None = Field(None, ge=2, le=WIDTH, description="GQA only: width of a head; null = dim / n_heads.")
    qk_norm: bool = Field(False, description="GQA only: RMSNorm on each query and key head.")
    qk_norm_span: Literal["head", "all"] = Field("head", description='"all": over all heads together, before RoPE.')
    attention_biases: Literal["none", "qkv", "all"] = Field(
        "none", description="GQA only: biases of the attention's matrices: none, of query, key and value, or all four."
    )
    q_lora_rank: int | None = Field(None, ge=1, le=WIDTH, description="MLA only: query latent; null = full-rank query.")
    kv_lora_rank: int | None = Field(None, ge=1, le=WIDTH, description="MLA only: key/value latent width.")
    qk_nope_head_dim: int | None = Field(None, ge=1, le=WIDTH, description="MLA only: head width without RoPE.")
    qk_rope_head_dim: int | None = Field(None, ge=2, le=WIDTH, description="MLA only: head width with RoPE.")
    v_head_dim: int | None = Field(None, ge=1, le=WIDTH, description="MLA only: value head width.")
    rope_theta: float = Field(10000.0, ge=1, le=1e30)
    rope_interleaved: bool = Field(False, description="Rotate adjacent pairs instead of halves.")
    rope_scaling: RopeScaling | None = Field(None, description="GQA only: RoPE stretched to longer sequences.")
    no_rope_layers: tuple[Annotated[int, Strict()], ...] = Field(
        (), strict=False, description="GQA only: layers without RoPE, counted through prelude, block and coda from 0."
    )
    norm_placement: Literal["before", "after"] = Field(
        "before", description="Norms of a layer: before attention and feed-forward, or on their output."
    )

    ffn_dim: int = Field(ge=1, le=WIDTH, description="Hidden width of the dense SwiGLU in prelude and coda.")
    n_experts: int = Field(ge=1, le=WIDTH, description="Routed experts per recurrent layer.")
    n_experts_per_tok: int = Field(ge=1, le=WIDTH)
    expert_dim: int = Field(ge=1, le=WIDTH, description="Hidden width of one routed expert.")
    n_shared_experts: int = Field(0, ge=0, le=WIDTH)
    shared_expert_dim: int | None = Field(
        None, ge=1, le=WIDTH, description="Width of one shared expert; null = expert_dim."
    )
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    route_scale: float = Field(1.0, gt=0, le=RATE, description="Factor on the normalised routing weights.")
    n_expert_groups: int | None = Field(None, ge=2, le=WIDTH, description="Group-limited routing: groups of experts.")
    n_limited_groups: int | None = Field(
        None, ge=1, le=WIDTH, description="Group-limited routing: groups a token may use."
    )

    injection: Literal["pre", "post"] = "pre"
    discretisation: Literal["euler", "zoh", "direct"] = Field(
        "euler", description="How B follows from dt; 'direct' (B itself learned, scalar dt) is OpenMythos's."
    )
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    initial_state: Literal["zeros", "embedding"] = "zeros"
    prelude_norm: bool = Field(True, description="RMSNorm on the prelude output e.")
    loop_embedding: Literal["scaled", "raw", "none"] = "scaled"
    lora_rank: int = Field(0, ge=0, le=WIDTH, description="Depth-wise LoRA rank; 0 = none.")
    lora_target: Literal["input", "output"] = Field("input", description="Where the loop's LoRA acts on the block.")

    halting: Literal["none", "act", "act_openmythos", "gate"] = Field(
        "none", description="Depth per position. 'gate' is made by mythos-ds train-gate from a trained model."
    )
    act_threshold: float = Field(0.99, gt=0, lt=1)

    tie_embeddings: bool = False
    norm_eps: float = Field(1e-6, ge=1e-30, le=1)
    embedding_std: float = Field(0.02, gt=0, le=RATE)
    init_std: float | None = Field(None, gt=0, le=RATE, description="null = sqrt(2 / (5 dim)).")

    @property
    def resolved_init_std(self) -> float:
        """Standard deviation of hidden matrices, sqrt(2/(5 d)) unless given (Nguyen & Salazar 2019)."""
        return self.init_std if self.init_std is not None else math.sqrt(2.0 / (5.0 * self.dim))

    @property
    def resolved_output_std(self) -> float:
        """Standard deviation of the last matrix of a branch: zero, unless a norm behind it would undo that."""
        return self.resolved_init_std if self.norm_placement == "after" else 0.0

    def rotates(self, part: Literal["prelude", "recurrent", "coda"], layer: int) -> bool:
        """Whether layer `layer` of `part` has RoPE."""
        before = {"prelude": 0, "recurrent": self.prelude_layers, "coda": self.prelude_layers + self.recurrent_layers}
        return before[part] + layer not in self.no_rope_layers

    @property
    def resolved_head_dim(self) -> int:
        """Width of one GQA head."""
        return self.head_dim if self.head_dim is not None else self.dim // self.n_heads

    @property
    def resolved_kv_heads(self) -> int:
        """Key/value heads of GQA."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def resolved_shared_dim(self) -> int:
        """Hidden width of one shared expert."""
        return self.shared_expert_dim if self.shared_expert_dim is not None else self.expert_dim


class ParallelConfig(Section):
    """How the model is cut over the processes."""

    ep_size: int | Literal["auto"] = Field("auto", description="Expert-parallel ranks; 'auto' = the largest that fits.")
    pp_size: int | list[int] = Field(
        1,
        description="Pipeline stages: P = a ring of P equal stages that share the loop's layers; [a, b, c] = so many "
        "processes for the prelude, the recurrent block and the coda; 1 = no pipeline.",
    )
    zero_stage: Literal[0, 1, 2, 3] = 3
    activation_checkpointing: ActivationCheckpointing = Field(
        "loop", description="Computed again in backward: nothing, each layer in each loop, or each loop; same results."
    )
    dispatch: Literal["all_to_all", "per_rank", "per_node", "deepep", "auto"] = Field(
        "all_to_all",
        description="How tokens reach experts on other processes: a copy for each expert, for each process that holds "
        "any of them, or for each node and then each process; or by DeepEP (never run); 'auto' = by the layout, of "
        "those that have run on this kind of device (docs/parallelism.md).",
    )
    dispatch_dtype: Literal["training", "fp8"] = Field(
        "training",
        description="How tokens travel to experts on other processes: in training.dtype, or in eight bits with a scale "
        "per token; results and gradients always in training.dtype (docs/parallelism.md).",
    )
    overlap: bool = Field(
        False,
        description="Two halves of each micro-batch take turns in the looped layers: one computes while the rows of "
        "the other travel to experts and back (docs/parallelism.md).",
    )
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_params: Literal["none", "cpu"] = "none"
    timeout_s: int = Field(1800, ge=10, le=SECONDS, description="Seconds a collective may wait before the run fails.")


class BatchRamp(Section):
    """A global batch that grows, as Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`."""

    start: int = Field(ge=1, le=IDS, description="Sequences of the first optimizer step.")
    increment: int = Field(ge=1, le=IDS, description="By how much the batch grows at a time, up to global_batch_size.")
    samples: int = Field(ge=1, le=10**18, description="Sequences over which it grows.")


class TrainingConfig(Section):
    """Length, batch, optimizer and depth of training."""

    seq_len: int = Field(ge=2, le=TOKENS)
    micro_batch_size: int = Field(ge=1, le=IDS, description="Sequences per process and micro-batch.")
    global_batch_size: int = Field(ge=1, le=IDS, description="Sequences per optimizer step over all processes.")
    global_batch_ramp: BatchRamp | None = Field(
        None,
        description="{start, increment, samples}: the batch grows from `start` by `increment` up to global_batch_size "
        "over the first `samples` sequences; null = no ramp.",
    )
    max_steps: int | None = Field(None, ge=1, le=STEPS)
    max_tokens: int | None = Field(None, ge=1, le=10**18)
    seed: int = Field(0, ge=0, le=2**31)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    grad_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What a weight's gradients of all loops are added up in, with dtype bfloat16; bfloat16 takes less "
        "memory and loses digits (docs/parallelism.md).",
    )
    compile: Literal["regions", "none"] | None = Field(
        None,
        description="What torch.compile makes of the model: few kernels of each region of elementwise work (norms, "
        "RoPE, injection, router, SwiGLU), or nothing; null = regions on CUDA, none on CPU (docs/gpu.md).",
    )
    init_from: str | None = Field(
        None,
        description="Where the weights come from: a model folder, a Hugging Face folder, OpenMythos weights, a run or "
        "a checkpoint; null = random. Optimizer, schedule and data start anew.",
    )
    frozen: list[str] = Field(
        default_factory=list,
        description='Parameters that are not trained, by name patterns such as "prelude.*" or "*.router.weight".',
    )

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = Field(gt=0, le=RATE, description="Peak learning rate at width lr_reference_dim.")
    lr_reference_dim: int = Field(128, ge=1, le=WIDTH, description="Matrices train at lr * lr_reference_dim / dim.")
    injection_lr: float | None = Field(
        None,
        gt=0,
        le=RATE,
        description="Peak learning rate of the injection (A, dt, B) and of the loop embedding, at any width; "
        "null = lr.",
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, ge=1e-30, le=RATE)
    weight_decay: float = Field(0.1, ge=0, le=RATE)
    muon_lr: float | None = Field(
        None,
        gt=0,
        le=RATE,
        description="Muon only: peak learning rate of the matrices, at any width; lr is then Adam's.",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon only.")
    grad_clip: float = Field(1.0, ge=0, le=1e30, description="Global gradient norm; 0 = no clipping.")
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(0, ge=0, le=STEPS)
    decay_fraction: float = Field(0.2, ge=0, le=1, description="wsd: last part of the run in which lr falls.")
    min_lr_ratio: float = Field(0.02, ge=0, le=1)

    depth_distribution: Literal["lognormal_poisson", "poisson", "uniform", "fixed"] = "lognormal_poisson"
    depth_sigma: float = Field(0.5, gt=0, le=10, description="lognormal_poisson: spread of the log rate.")
    depth_per: Literal["step", "sequence"] = Field(
        "step",
        description="What draws a loop count: a step for all its sequences, or each sequence its own; a step then runs "
        "the largest of them.",
    )
    depth_curriculum_steps: int = Field(
        0,
        ge=0,
        le=STEPS,
        description="Steps over which the distribution's mean grows linearly from 1 to mean_recurrence; 0 = none.",
    )
    mean_backprop_depth: int | None = Field(
        None, ge=1, le=LOOPS, description="Loops with gradient; null = ceil(mean/2)."
    )

    balance_loss: float = Field(1e-4, ge=0, le=RATE, description="Weight of the sequence-wise balance loss.")
    z_loss: float = Field(1e-5, ge=0, le=RATE, description="Weight of the router z-loss.")
    ponder_cost: float = Field(0.0, ge=0, le=RATE, description="Weight of the ponder cost (halting 'act').")
    router_bias_rate: float | None = Field(None, ge=0, le=RATE, description="u_b; null = 1e-3 / mean_recurrence.")

    eval_interval: int = Field(500, ge=0, le=STEPS, description="Steps between evaluations; 0 = only at the end.")
    eval_batches: int = Field(16, ge=1, le=STEPS, description="Global batches per evaluation and loop count.")
    eval_deep_every: int = Field(1, ge=1, le=STEPS, description="One of so many evaluations runs 4T and 8T loops too.")


Share = Annotated[float, Strict(), Field(le=1e9)]
"""One of the three shares of a split; a rule says that none is negative."""


class DatasetConfig(Section):
    """One indexed dataset of a blend."""

    prefix: str = Field(description="Path of the .bin/.idx pair without its ending.")
    weight: float = Field(1.0, gt=0, le=1e12)


class DataConfig(Section):
    """Where the tokens come from."""

    corpus: Literal["builtin"] | None = Field(None, description="Text made from the Python installation itself.")
    datasets: list[DatasetConfig] | None = None
    tokenizer: str | None = Field(
        None, description="A tokenizer's file, or its folder; not needed for the built-in corpus."
    )
    split: tuple[Share, Share, Share] = Field(
        (98.0, 2.0, 0.0), strict=False, description="train, valid, test; 0 for valid = no validation."
    )
    validation: str | list[DatasetConfig] | None = Field(
        None,
        description="Held-out text of its own, of the same tokenizer: a prefix, or a list as `datasets`; the valid "
        'share of `split` is then trained on. "none" = no validation; null = the valid share of `split`.',
    )
    data_dir: str = Field("data", description="Folder for the built-in corpus and the index cache (shared storage).")
    document_mask: bool = Field(True, description="Attention and positions stay inside a document.")
    loss_mask: bool | None = Field(
        None,
        description="Conversations (prepare-data --chat): true = only what the assistant writes counts in the loss, "
        "and all datasets must be such; false = all their tokens count; null = true for those that are.",
    )
    num_workers: int = Field(0, ge=0, le=128, description="Processes that read ahead, for each process of the run.")

    @property
    def own_validation(self) -> list[DatasetConfig]:
        """The datasets that are held out whole; none where a share of the others is, or nothing."""
        if isinstance(self.validation, str):
            return [] if self.validation == NO_VALIDATION else [DatasetConfig(prefix=self.validation)]
        return self.validation or []

    @property
    def used_split(self) -> tuple[float, float, float]:
        """The shares of train, valid and test in `datasets`, or in the built-in corpus."""
        train, valid, test = self.split
        return self.split if self.validation is None else (train + valid, 0.0, test)

    @property
    def validates(self) -> bool:
        """Whether there is held-out text."""
        return bool(self.own_validation) or self.used_split[1] > 0


class CheckpointConfig(Section):
    """When training state is saved."""

    interval: int = Field(1000, ge=0, le=STEPS, description="Steps between saves; 0 = only at the end and on SIGTERM.")
    keep: int = Field(2, ge=1, le=STEPS, description="Newest checkpoints that are kept.")
    keep_every: int = Field(
        0, ge=0, le=STEPS, description="Checkpoints of multiples of this step stay for good; 0 = none."
    )
    asynchronous: bool = Field(
        False, description="Training waits for a copy in host memory only; the files are written beside it."
    )


class MonitorConfig(Section):
    """What is logged."""

    log_interval: int = Field(10, ge=1, le=STEPS)
    tensorboard: bool = True
    csv: bool = Field(False, description="metrics.csv: a row for each logged step, a column for each number.")
    wandb: str | None = Field(
        None,
        min_length=1,
        description="Weights & Biases (extra `wandb`): the project to log to; null = none. Key and mode come from the "
        "environment: WANDB_API_KEY, WANDB_MODE=offline.",
    )
    sample_prompts: list[str] = Field(default_factory=list, description="Continued in text at each evaluation.")
    sample_tokens: int = Field(48, ge=1, le=1_000_000)


class ClusterConfig(Section):
    """The cluster a file is laid out for. Planning and launch tools read it; ep_size must fit its nodes."""

    gpu: str
    nodes: int = Field(ge=1, le=1_000_000)
    gpus_per_node: int = Field(ge=1, le=1024)
    context_bytes: int | None = Field(
        None,
        ge=0,
        le=10**12,
        description="Bytes of each GPU that CUDA's context and NCCL's communicators take, as mythos-ds preflight "
        "measures them; null = by the planner's formula.",
    )


class RunConfig(Section):
    """One run, as its JSON file says it."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    cluster: ClusterConfig | None = None
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="Goes to DeepSpeed as written; null = absent.")
