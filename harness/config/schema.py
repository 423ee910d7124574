"""Everything that a run file can say: one frozen model a section, one documented field a setting.

A field is `free` when it may change between the attempts of one run, and `fixed` when a run that resumes must keep it.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which `~` is the home folder, or what may stand instead of one: a name, a URL."""


def fixed(default: Any = ..., **kwargs: Any) -> Any:
    """A field that a resumed run must keep."""
    return Field(default, json_schema_extra={"resume": "fixed"}, **kwargs)


def free(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change when a run resumes."""
    return Field(default, json_schema_extra={"resume": "free"}, **kwargs)


class Section(BaseModel):
    """Base of all sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(Section):
    """Where raw examples come from. Exactly one of `path`, `hub` and `builtin` is set."""

    path: Place | list[Place] | None = fixed(None, description="A file, a list of files or a glob, in which `**` goes through all folders below.")
    hub: str | None = fixed(None, description="A data set on the Hugging Face hub, by name (needs a network).")
    builtin: Literal["python-prose", "python-qa"] | None = fixed(
        None, description="Text that every Python installation carries: the language reference, or questions about the library."
    )
    split: str = fixed("train", description="The split of a hub data set.")
    format: Literal["jsonl", "csv", "parquet", "text"] | None = fixed(
        None, description="The format of all files; by default that of each from its suffix. A text file is one document; pieces of some 4,000 characters are its rows."
    )
    encoding: str = fixed("utf-8", description="Text encoding of the files.")
    max_rows: Positive | None = fixed(None, description="Take only the first rows.")


class Columns(Section):
    """The names of the columns that hold each part of an example."""

    text: str = fixed("text")
    prompt: str = fixed("prompt")
    completion: str = fixed("completion")
    messages: str = fixed("messages")
    tools: str = fixed("tools", description="Definitions of functions, as a list or JSON text; read where a source has the column.")


class TemplateSpec(Section):
    """How an example becomes text. `{prompt}` and `{completion}` stand for the columns, each in its part; no other name does."""

    name: str = fixed("plain", description="A name that is kept in the index and the export.")
    prompt: str = fixed("{prompt}\n", description="Text before the trained part.")
    completion: str = fixed("{completion}", description="The trained part; the end-of-text token follows it.")


class Bpe(Section):
    """A byte-level BPE to train on the training source, when there is no tokenizer yet."""

    vocab_size: Annotated[int, Field(ge=257)] = fixed(8192)


class SetSpec(Section):
    """A prepared set in a mixture."""

    dir: Place = free(description="Folder or URL that `harness prepare` filled: `train/`, `validation/` and `tokenizer/` below it.")
    weight: Annotated[float, Field(gt=0)] = fixed(1.0, description="Share of the rows, in proportion to the other weights.")
    max_epochs: Annotated[float, Field(gt=0)] | None = fixed(None, description="Passes after which the set is used up; the others go on.")


class Data(Section):
    """What to train on: raw sources, their shape, and the folder of shards made from them; or prepared sets."""

    dir: Place | None = free(None, description="Folder of the prepared shard sets: `train/` and `validation/` below it.")
    train: Source | None = fixed(None, description="Source of the training examples.")
    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], SetSpec] | None = free(
        None, description="Prepared sets by name, mixed by weight, instead of `train`; each is evaluated apart."
    )
    cache_dir: Place | None = free(None, description="Folder on a local disk for files of remote sets; by default ~/.cache/harness.")
    cache_gib: Annotated[float, Field(gt=0)] = free(50.0, description="The most that files of remote sets may take there, in GiB.")
    validation: Source | None = fixed(None, description="Source of the validation examples; by default a share of `train`.")
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = fixed(
        0.02, description="Share of the training source that is held out when `validation` is not given."
    )
    shape: Literal["text", "prompt_completion", "messages"] = fixed("text", description="What one example is.")
    columns: Columns = fixed(Columns())
    template: TemplateSpec = fixed(TemplateSpec(), description="Used with `shape: prompt_completion`.")
    tokenizer: Place | None = fixed(None, description="Folder or hub name; by default that of `model.path`.")
    date: datetime.date | None = fixed(None, description="The day that a chat template writes which asks for today's; kept in the tokenizer of the set and of exports.")
    train_tokenizer: Bpe | None = fixed(None, description="Train a byte-level BPE instead, kept in `dir/tokenizer`.")
    sequence_length: Annotated[int, Field(ge=8)] = fixed(1024, description="Tokens in a row.")
    packing: Literal["none", "best_fit"] = fixed("best_fit", description="One document a row, or several packed into it.")
    long_documents: Literal["cut", "truncate", "drop"] = fixed(
        "cut", description="A document longer than a row is cut into pieces, loses its end, or is dropped."
    )
    window_shards: Positive = fixed(
        16, description="Shards whose rows are shuffled together: more mix better, fewer are needed at a time."
    )
    broken_rows: Literal["refuse", "drop"] = fixed("refuse", description="A row that cannot be read is refused, or dropped and counted.")
    max_dropped_share: Share = free(0.05, description="Refuse when a larger share of the rows is dropped, also for their length.")
    accept_appended: bool = free(False, description="Go on when shards were added since the run began: a new epoch over all rows begins.")
    num_processes: Positive | None = free(None, description="Processes that prepare; by default one a core, and this one alone where there is little text.")


class Model(Section):
    """The model to start from. Exactly one of `path` and `architecture` is set."""

    path: Place | None = fixed(None, description="Folder or hub name of a pretrained causal language model.")
    architecture: dict[str, Any] | None = fixed(
        None, description="From scratch: `model_type` and the fields of its transformers configuration."
    )
    trust_code: bool = fixed(False, description="Run code that ships with the model.")
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = free(
        "auto", description="What computes attention; auto: the fastest that fits device, precision and model."
    )
    loss: Literal["auto", "chunked", "plain"] = free(
        "auto", description="chunked: some tokens at a time, without the logits of a whole micro-batch; auto: so on GPUs, where the model allows it."
    )
    dropout: Share | None = fixed(None, description="Set every dropout of the configuration; by default as configured.")


class Train(Section):
    """How long, in which portions and in which precision. Exactly one of `steps` and `epochs` is set."""

    steps: Positive | None = free(None, description="Optimizer steps.")
    epochs: Annotated[float, Field(gt=0)] | None = free(None, description="Passes over the training rows.")
    global_batch_rows: Positive | None = free(None, description="Rows of one optimizer step, over all ranks.")
    global_batch_tokens: Positive | None = free(None, description="The same in tokens: rows times sequence length.")
    micro_batch: Positive = free(1, description="Rows of one forward pass on one rank.")
    precision: Literal["bf16", "fp16", "fp32"] = fixed("bf16")
    accumulate_in: Literal["fp32", "model"] = fixed("fp32", description="Type in which gradients are accumulated.")
    clip: Annotated[float, Field(ge=0.0)] = free(1.0, description="Largest gradient norm; 0 does not clip.")
    activation_checkpointing: int = free(
        0, ge=0, description="0: keep all activations; 1: recompute every block; n: every n-th block."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = fixed(0)
    spikes: Literal["ignore", "warn", "rollback", "stop"] = free("warn", description="What a loss far above its recent past does.")
    spike_zscore: Annotated[float, Field(gt=0)] = free(12.0, description="How far, in robust standard deviations of the last 128 losses.")
    max_rollbacks: Annotated[int, Field(ge=0)] = free(3, description="How often in one run a spike takes training back to the last checkpoint.")
    max_skipped_steps: Positive = free(50, description="Stop after so many steps in a row whose gradient was not finite.")


class Optimizer(Section):
    """AdamW and the course of its learning rate."""

    lr: Annotated[float, Field(gt=0)] = free(5e-5, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = free((0.9, 0.999))
    eps: Annotated[float, Field(gt=0)] = free(1e-8)
    weight_decay: Annotated[float, Field(ge=0)] = free(0.01, description="On matrices only; never on biases and norms.")
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = free("linear")
    warmup_steps: Annotated[int, Field(ge=0)] | None = free(None, description="Steps from 0 to the peak.")
    warmup_epochs: Annotated[float, Field(ge=0)] | None = free(None, description="The same in epochs.")
    decay_steps: Annotated[int, Field(ge=0)] | None = free(
        None, description="Last steps that fall, under `warmup_stable_decay`; by default a tenth."
    )
    min_lr_share: Share = free(0.0, description="Where the fall ends, as a share of the peak.")


class Engine(Section):
    """Which DeepSpeed configuration, and what belongs to the machine."""

    deepspeed: Place = free("zero3", description="A name in `ds_configs/` or the path of a JSON file.")
    pipeline_stages: Positive = free(1, description="Stages of the pipeline engine; 1 is the ZeRO engine.")
    partition: Literal["flops", "parameters", "time"] = free(
        "flops", description="What the stages share evenly: operations, parameters, or time measured on rank 0 at the start."
    )
    nvme_dir: Place | None = free(None, description="Folder on a local NVMe; run, host and rank are added.")
    device: Literal["auto", "cuda", "cpu"] = free("auto", description="`cpu` trains without a GPU and asks for no warning.")
    timeout_minutes: Annotated[float, Field(gt=0)] = free(10.0, description="Longest wait in a collective.")


class Evaluation(Section):
    """When to look, at what, and when to give up."""

    every_steps: Positive | None = free(None, description="Steps between evaluations; there is always one at the end.")
    at_start: bool = free(True, description="Also before the first step.")
    micro_batch: Positive | None = free(None, description="Rows of one forward pass; by default that of training.")
    prompts: list[str] = free([], description="Answered at every evaluation and written to TensorBoard.")
    max_new_tokens: Positive = free(48)
    patience: Positive | None = free(None, description="Stop after so many evaluations without a better loss.")


class Checkpoint(Section):
    """When to save and what to keep."""

    every_steps: Positive | None = free(None, description="Steps between checkpoints; there is always one at the end.")
    every_minutes: Annotated[float, Field(gt=0)] | None = free(30.0, description="Also after so much time since the last one; null for not by time.")
    keep_every_steps: Positive | None = free(None, description="Checkpoints of steps that this divides are kept for good.")
    keep_last: Positive = free(2)
    keep_best: bool = free(True, description="Also keep the checkpoint of the lowest evaluation loss.")
    asynchronous: bool = free(True, description="Copy the state to host memory and write it while training goes on.")
    grace_seconds: Annotated[float, Field(gt=0)] | None = free(
        None, description="Seconds from a stop signal to the kill: a save that would take longer is left out. Without it a save is always made."
    )


class Slurm(Section):
    """A Slurm job: one node starter a node."""

    nodes: Positive = free(1, description="Nodes.")
    ranks_per_node: Positive = free(1, description="Ranks of each node, with a GPU each unless `engine.device` is cpu.")
    partition: str | None = free(None)
    time: str | None = free(None, description="Time limit as sbatch takes it, such as 12:00:00 or 1-0; by default the partition's.")
    account: str | None = free(None)
    qos: str | None = free(None)
    cpus_per_node: Positive | None = free(None, description="Cores of each node; by default whole nodes.")
    grace_seconds: Positive = free(120, description="How long before the time limit the ranks are told to save; also `checkpoint.grace_seconds` there.")
    extra: list[str] = free([], description="More options of sbatch, one an entry, such as `--constraint=a100`.")


class Secret(Section):
    """A value in a Kubernetes Secret; only its name is ever written."""

    name: str = free(description="Name of the Secret.")
    key: str = free(description="Key in it.")


class Kubernetes(Section):
    """A Kubernetes job: one node starter a pod."""

    kind: Literal["job", "jobset", "trainjob"] = free("job", description="An Indexed Job, a JobSet, or a TrainJob of Kubeflow Trainer.")
    image: str | None = free(None, description="Image that holds the harness; a digest says exactly which.")
    python: str = free("python", description="The interpreter in the image.")
    name: str | None = free(None, description="Of the job and its service; by default the last part of `run_dir`.")
    namespace: str = free("default")
    pods: Positive = free(1)
    ranks_per_pod: Positive = free(1, description="Ranks of each pod, with a GPU each unless `engine.device` is cpu.")
    gpu_resource: str = free("nvidia.com/gpu", description="What a GPU is called in the cluster.")
    resources: dict[str, str] = free({}, description="Other resources of a pod, such as `{cpu: 16, memory: 128Gi}` in quotes.")
    mounts: dict[str, str] = free({}, description="Path in the pod -> PersistentVolumeClaim, or CLAIM/FOLDER for a part of it; all pods share them.")
    work_dir: str = free("/work", description="Folder in the pod from which relative paths count.")
    env: dict[str, str] = free({}, description="Variables of the pods, for everyone to read.")
    secrets: dict[str, Secret] = free({}, description="Variables of the pods whose values stand in Secrets.")
    pull_secret: str | None = free(None, description="Secret for the image's registry.")
    service_account: str | None = free(None, description="By default the pods get no credentials of the cluster.")
    user: Positive = free(10001, description="Number of the user and group that the pods run as; files of claims get that group.")
    node_selector: dict[str, str] = free({})
    tolerations: list[dict[str, Any]] = free([], description="As in a pod's specification.")
    shm_size: str = free("8Gi", description="Shared memory of a pod, for NCCL and data loaders; counts as its memory.")
    grace_seconds: Positive = free(120, description="From the request to stop to the kill; also `checkpoint.grace_seconds` there.")


class Hosts(Section):
    """Hosts that are reached over ssh, for `--on hosts` and `--on mpi`."""

    file: Place | None = free(None, description="A hostfile: a line a host, `HOST slots=N`, N its ranks.")
    include: list[str] = free([], description="Only these hosts of it.")
    exclude: list[str] = free([], description="Not these hosts of it.")
    at_least: Positive | None = free(None, description="Go on without hosts that fail their check while so many are left; by default all must pass.")
    through: Literal["auto", "deepspeed", "ssh"] = free("auto", description="DeepSpeed's launcher and pdsh, or plain ssh; auto: the first where pdsh is.")
    ssh_port: Positive | None = free(None)
    master: str | None = free(None, description="Address of the first host for the others; by default its name in the hostfile.")
    port: Positive | None = free(None, description="Where ranks meet on the first host, and starters one above; by default a new one each start.")
    environment: dict[str, str] = free({}, description="More variables for every rank.")


class Launch(Section):
    """What a launcher needs to know."""

    ranks: Positive | None = free(None, description="Ranks that must meet; another number is refused.")
    hosts: Hosts = free(Hosts())
    restarts: Annotated[int, Field(ge=0)] = free(3, description="Starts after a rank was lost or failed, in a row, without a new checkpoint.")
    silence_seconds: Annotated[float, Field(gt=0)] | None = free(
        None, description="A rank that shows no sign of life for so long ends the run; by default learned from its pace, at least a minute."
    )
    slurm: Slurm = free(Slurm())
    kubernetes: Kubernetes = free(Kubernetes())


class RunFile(Section):
    """A whole run file."""

    run_dir: Place = free(description="Folder that holds everything the run writes.")
    data: Data
    model: Model
    train: Train
    optimizer: Optimizer = Optimizer()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    launch: Launch = Launch()

    @property
    def run_path(self) -> Path:
        """`run_dir` as a path."""
        return Path(self.run_dir)
