"""Every setting, typed, with its unit and its default. `load.py` reads files into these.

Sections: model, data, training, parallel, logging; `study` holds a grid of cells.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from megaarch.config import catalogue
from megaarch.config.registry import name_in

LARGEST_LAYERS = 1024  # DeepNet has 1,000 (Wang et al. 2022, arXiv:2203.00555)
Positive = Annotated[int, Field(gt=0, le=1 << 40)]
NonNegative = Annotated[int, Field(ge=0, le=1 << 40)]
Layers = Annotated[int, Field(gt=0, le=LARGEST_LAYERS)]
Degree = Annotated[int, Field(gt=0, le=1 << 20)]  # of parallelism
Width = Annotated[int, Field(gt=0, le=1 << 20)]
Length = Annotated[int, Field(gt=0, le=1 << 24)]  # tokens of a row
Distance = Annotated[int, Field(gt=0, le=1 << 20)]  # tokens between a query and a key
Rows = Annotated[int, Field(gt=0, le=1 << 16)]  # that a process holds at a time
MOST_SENTINELS = 1 << 20
Count = Annotated[int, Field(ge=0, le=MOST_SENTINELS)]  # of sentinels, segments or unused rows
MOST = 1 << 24
Number = Annotated[int, Field(gt=0, le=MOST)]  # of rows, pieces or items
Processes = Annotated[int, Field(ge=0, le=1024)]  # of one machine
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]*$")]
ArchitectureName = Annotated[str, name_in(catalogue.ARCHITECTURES)]
ObjectiveName = Annotated[str, name_in(catalogue.OBJECTIVES)]
PresetName = Annotated[str, name_in(catalogue.PRESETS)]
AttentionKernel = Annotated[str, name_in(catalogue.KERNELS, also=("auto",))]
OptimizerName = Annotated[str, name_in(catalogue.OPTIMIZERS)]
FusedKernel = Literal["rms_norm", "rows", "cross_entropy"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), strict=True, allow_inf_nan=False
    )


class RopeScaling(Section):
    """How RoPE's frequencies are lowered for rows longer than those that they were learned on.

    linear: all, by `factor`. llama3 and yarn: the low ones by `factor`, the high ones not at all, and
    a ramp between them. dynamic: none up to `original_length` tokens, and rows end there.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1)]
    original_length: Length | None = None  # tokens; of every kind but linear
    # llama3: turns in original_length below which a frequency is low, above which it is high
    low_frequency_factor: Annotated[float, Field(gt=0)] = 1.0
    high_frequency_factor: Annotated[float, Field(gt=0)] = 4.0
    # yarn: the same turns, the high ones first; its ramp's ends are whole channels if `truncate`
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    truncate: bool = True
    # yarn: on queries and keys each; None: 0.1·ln(factor) + 1
    attention_factor: Annotated[float, Field(gt=0)] | None = None


class Model(Section):
    """The transformer. Defaults are the study's backbone, the same for all architectures."""

    preset: PresetName | None = None
    architecture: ArchitectureName = "causal_decoder"
    layers: Layers = 6  # of each stack, unless encoder_layers or decoder_layers say otherwise
    encoder_layers: Layers | None = None
    decoder_layers: Layers | None = None
    hidden_size: Width = 256
    heads: Width = 4
    kv_heads: Width | None = None  # None: as many as heads
    head_size: Width | None = None  # None: hidden_size / heads
    feed_forward_size: Number = 688
    sequence_length: Length = 512  # tokens of a row of the first stream
    target_length: Length | None = None  # decoder row of an encoder-decoder; None: derived
    vocabulary_size: Number = 8192  # pieces, specials and sentinels together
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    normalization_position: Literal["pre", "post"] = "pre"
    normalization_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    final_normalization: bool = True
    position_encoding: Literal["rope", "learned", "relative", "none"] = "rope"
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: Width = 32
    relative_max_distance: Distance = 128
    learned_positions: Length | None = None  # rows of the table; None: sequence_length
    position_offset: Count = 0  # BART keeps two unused rows before the table
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    bias: bool = False
    attention_scale: Annotated[float, Field(gt=0)] | None = None  # None: 1/sqrt(head_size)
    tied_embedding: bool = True
    embedding_normalization: bool = False
    output_scale: Annotated[float, Field(gt=0)] | None = None  # T5 tied: hidden_size ** -0.5
    segments: Count = 0  # token types (BERT has 2)
    head_transform: bool = False  # BERT's dense + activation + norm before the output
    output_bias: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # None: GPT-2's, by initial_deviation; t5x: T5X's (model/initialize.py), under which attention_scale
    # is 1.0 and, of a tied embedding, output_scale hidden_size ** -0.5 where they are not given
    initializer: Literal["t5x"] | None = None
    initial_deviation: Annotated[float, Field(gt=0)] = 0.02
    attention: AttentionKernel = "auto"
    # of csrc/, in place of torch's; docs/kernels.md
    fused_kernels: Annotated[tuple[FusedKernel, ...], Field(strict=False)] = ()

    @model_validator(mode="before")
    @classmethod
    def _scales_of_initializer(cls, given: object) -> object:
        """T5X folds the scale of scores into the initial queries, and takes an embedding of deviation 1
        out of the logits."""
        if not isinstance(given, dict) or given.get("initializer") != "t5x":
            return given
        scales: dict[str, object] = {"attention_scale": 1.0}
        width = given.get("hidden_size", cls.model_fields["hidden_size"].default)
        if given.get("tied_embedding", True) is True and isinstance(width, int) and width > 0:
            scales["output_scale"] = width**-0.5
        return scales | given

    @property
    def position_rows(self) -> int:
        """Tokens that a table of learned positions reaches."""
        return self.learned_positions or max(self.sequence_length, self.target_length or 0)


class Source(Section):
    path: Text
    weight: Annotated[float, Field(ge=1e-18, le=1e18)] = 1.0  # to those of the others


# Names the branch of `source` in a mistake's path, of which the user knows nothing
SOURCE_TAGS = ("<text>", "<list>")


def _branch(source: object) -> str:
    return SOURCE_TAGS[isinstance(source, list)]


class Data(Section):
    source: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[list[Source], Tag("<list>")],
        Discriminator(_branch),
    ] = "embedded"
    kind: Literal["auto", "text", "supervised"] = "auto"
    text_field: Text = "text"
    tokenizer: Text | None = None  # file; None: train SentencePiece on the train split
    sentinels: Count = 100
    objective: ObjectiveName = "full_lm"
    noise_density: Share | None = None  # None: the objective's own
    mean_span_length: Annotated[float, Field(gt=0)] | None = None
    whole_word_masking: bool = False
    max_predictions: Length | None = None  # masked_lm: chosen tokens of a row at most
    fim_rate: Share | None = None  # fill_in_middle: share of rows whose middle moves; None: 0.5
    pack: bool = True  # several short examples in a row (supervised data)
    # text: an example is of one document, and packed ones do not see each other; studies: true
    document_masks: bool = False
    # supervised: tokens of an input or a target at most, with its eos; None: what the row holds
    max_input_length: Length | None = None
    max_target_length: Length | None = None
    held_out: Annotated[float, Field(ge=1e-4, lt=1)] = 0.1
    cache: Text = "runs/data"
    workers: Processes | None = None  # None: 4 on CUDA, 0 (the trainer's process) on a CPU

    @property
    def sources(self) -> list[Source]:
        """`source` as a list, one that is a text with weight 1."""
        return [Source(path=self.source)] if isinstance(self.source, str) else self.source


class Budget(Section):
    match: Literal["flops", "seen_tokens", "target_tokens"] = "flops"
    amount: Annotated[float, Field(gt=0)]


class Training(Section):
    steps: Positive | None = None
    budget: Budget | None = None
    micro_batch_size: Rows = 8
    global_batch_size: Number = 8  # rows a step
    global_batch_tokens: Positive | None = None  # seen tokens a step, in place of rows
    seed: NonNegative = 0
    optimizer: OptimizerName = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["cosine", "wsd", "inverse_square_root", "constant"] = "cosine"
    warmup: Rate = 0.05  # below 1 a share of the run, else steps
    decay: Share = 0.2  # wsd: share of the run that decays
    minimum_learning_rate: Share = 0.1  # as a share of learning_rate
    weight_decay: Rate = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_gradient: Rate = 1.0  # 0: no clipping
    z_loss: Rate = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    float8: Literal["tensorwise", "rowwise"] | None = None  # products of layers; torchao's recipes
    float8_emulate: bool = False  # in fp32 arithmetic, where there are no units for float8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | None = None  # None: on CUDA (parallel/compile.py)
    deterministic: bool = False
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: torch's own choice
    eval_every: NonNegative = 0  # steps from one scoring of held-out text to the next; 0: none
    eval_documents: Number = 64  # that are scored then
    save_every: NonNegative = 0  # steps; 0: at the end only
    keep_checkpoints: NonNegative = 2  # newest ones; 0: all
    keep_every: NonNegative = 0  # steps; checkpoints at its multiples stay for good
    async_save: bool = False  # write checkpoints while training goes on
    heartbeat_timeout: Rate = 60.0  # seconds of silence after which a rank is lost; 0: no watch
    hang_timeout: Rate = 300.0  # seconds that a step may take on any rank; 0: no bound
    skip_limit: NonNegative = 3  # steps in a row whose loss or gradient is not finite
    resume: bool = True
    start_from: Text | None = None  # checkpoint whose weights a new run starts from
    # with its optimizer's state, step and totals: `steps`, `budget` and the schedule count its own too
    start_optimizer: bool = False
    # that of an encoder-decoder which starts from a decoder: from its self-attention, or drawn anew
    start_cross_attention: Literal["self_attention", "random"] = "self_attention"


class Parallel(Section):
    tensor_parallel: Degree = 1
    pipeline_parallel: Degree = 1
    context_parallel: Degree = 1
    data_parallel_shard: Degree = 1
    data_parallel_replicate: Degree = 1
    engine: Literal["torch", "deepspeed"] = "torch"  # of data parallelism
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None  # deepspeed's; None: 1
    offload: bool | None = None  # deepspeed: optimizer (and stage 3's parameters) in host memory
    deepspeed_config: Text | None = None  # a DeepSpeed JSON, in place of the two above
    # gather a layer's parameters again for its backward; None: unless there is a pipeline, which
    # would gather them for each micro-batch
    reshard_after_forward: bool | None = None
    # What a layer's backward recomputes: selective keeps outputs of attention, matrix products and
    # messages other than gathers.
    recompute: Literal["none", "selective", "full"] = "none"
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    stages_per_rank: Degree = 1  # of the pipeline; 2 or more: interleaved; zero_bubble with 2: a V

    @property
    def data_ranks(self) -> int:
        """Ranks among which the rows of a step are divided."""
        return self.data_parallel_shard * self.data_parallel_replicate

    @property
    def splits_backward(self) -> bool:
        """Whether a backward pass runs in two halves. A schedule is of a pipeline."""
        return self.pipeline_parallel > 1 and self.schedule == "zero_bubble"

    @property
    def gathers_again(self) -> bool:
        """Whether a layer's parameters are given back after its forward pass and gathered again for
        its backward pass. Where they are not sharded they stay, whatever the setting says."""
        if self.data_parallel_shard * self.context_parallel == 1:
            return False
        given = self.reshard_after_forward
        return self.pipeline_parallel == 1 if given is None else given


class Logging(Section):
    directory: Text = "runs/train"
    tensorboard: bool = True
    wandb: bool = False
    profile_from: NonNegative = 0  # first step of a trace by torch's profiler; 0: no trace
    profile_steps: Positive = 3
    profile_ranks: Annotated[tuple[NonNegative, ...], Field(strict=False)] = (0,)  # that write one


class Size(Section):
    """One size of a study; what is given replaces the model section's value."""

    name: str
    layers: Layers | None = None
    hidden_size: Width | None = None
    heads: Width | None = None
    feed_forward_size: Number | None = None


class Cell(Section):
    """One cell of a study's grid, before sizes, budgets and seeds multiply it.

    `set` holds dotted settings, as `--set` takes them. `start_from` names the parent cell whose
    weights it starts from; `budget` then is what it adds.
    """

    name: str
    preset: PresetName | None = None
    start_from: str | None = Field(default=None, alias="from")
    budget: Annotated[float, Field(gt=0)] | None = None
    set: dict[str, object] = {}


ADAPTED = "-adapted"  # ends the names of these children


class Adapt(Section):
    """What every cell of a study gets: a child that is trained on one objective, NAME-adapted.

    objective: None: full_lm where no token sees later ones, else prefix_lm. `set` holds dotted
    settings of the children, over those of their parents' cells.
    """

    budget: Annotated[float, Field(gt=0)]  # that is added, in what study.match counts
    objective: ObjectiveName | None = None
    set: dict[str, object] = {}


class Tune(Section):
    """A sweep: each cell of the first seed tries every rate, with every batch and, if it has two stacks,
    every division of its layers (study/sweep_grid.py). Cells of other sizes than `sizes` get their rate by a law
    of those of their name (study/rate_law.py)."""

    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    global_batch_tokens: list[Positive] = []
    encoder_shares: list[Annotated[float, Field(gt=0, lt=1)]] = []  # of both stacks' layers
    sizes: list[Text] = []  # names of study.sizes; empty: all
    budget: Annotated[float, Field(gt=0, le=1)] = 0.3  # share of the cell's budget for each trial


class Evaluation(Section):
    points: Number = 8  # held-out values on the curve, besides the one before training
    curve_documents: Number = 32
    documents: Number = 64
    prefix_tokens: Number = 64
    continuation_tokens: Number = 24
    choices: Number = 64  # items of the four-way choice
    middles: Count = 32
    lengths: Annotated[tuple[Number, ...], Field(strict=False)] = (1, 2, 4, 8, 16, 32)
    by_length: Count = 64  # items whose first `lengths` tokens are scored, after two prefixes each
    batch_rows: Rows = 32
    # files NAME.task.yaml, folders of them, and names of lm-evaluation-harness's tasks
    tasks: list[Text] = []
    include_path: Text | None = None  # a folder with tasks of the harness beside its own
    task_items: Number = 100  # held-out items of a task
    # answered examples before a question; several numbers make a curve, whose first one ranks
    shots: Count | Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = 0

    @property
    def numbers_of_shots(self) -> tuple[int, ...]:
        return self.shots if isinstance(self.shots, tuple) else (self.shots,)


class Study(Section):
    name: str = "study"
    match: Literal["flops", "seen_tokens", "parameters", "target_tokens"] = "flops"
    budgets: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    sizes: list[Size] = []
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    encoder_decoder_size: Literal["layers_per_stack", "parameters"] = "layers_per_stack"
    cells: Annotated[list[Cell], Field(min_length=1)]
    lanes: Annotated[Processes, Field(gt=0)] = 1  # cells that run at a time, a process each
    rates: Text | None = None  # rates.json of a sweep: learning rate by cell name
    tune: Tune | None = None
    adapt: Adapt | None = None
    evaluation: Evaluation = Evaluation()


class Settings(Section):
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    parallel: Parallel = Parallel()
    logging: Logging = Logging()
    study: Study | None = None
