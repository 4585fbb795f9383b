"""The layouts that every preset has to equal one process in, and what they are compared under."""


def layout(**sizes: int | str) -> dict[str, int | str]:
    return {f"parallel.{name}": size for name, size in sizes.items()}


TP2 = layout(tensor_parallel=2)
PP2 = layout(pipeline_parallel=2)
CP2 = layout(context_parallel=2)
FSDP2 = layout(data_parallel_shard=2)
HSDP = layout(data_parallel_shard=2, data_parallel_replicate=2)
PP4_INTERLEAVED = layout(pipeline_parallel=4, schedule="interleaved_1f1b", stages_per_rank=2)

DEEPER = {"model.layers": 3}  # odd, and enough layers for four stages of an encoder-decoder
# wide enough for the factors of Adafactor
FACTORED = {"model.hidden_size": 128, "model.head_size": 64, "model.feed_forward_size": 256}
DEEPEST = {"model.layers": 8}  # a layer for each of eight stages

# name -> parallel settings of two processes
TWO_RANKS = {"fsdp2": FSDP2, "tp2": TP2, "pp2": PP2}

# name -> processes, parallel settings, model settings
LAYOUTS = {
    "tp2": (2, TP2, DEEPER),
    "pp2": (2, PP2, DEEPER),
    "pp4 interleaved": (4, PP4_INTERLEAVED, DEEPEST),
    "cp2": (2, CP2, DEEPER),
    "fsdp2": (2, FSDP2, DEEPER),
    "hsdp": (4, HSDP, DEEPER),
    "tp2 x pp2": (4, TP2 | PP2, DEEPER),
    "tp2 x fsdp2": (4, TP2 | FSDP2, DEEPER),
    "pp2 x fsdp2": (4, PP2 | FSDP2, DEEPER),
    "cp2 x tp2": (4, CP2 | TP2, DEEPER),
}
LARGER = {
    "tp2 x pp2 x fsdp2": (8, TP2 | PP2 | FSDP2, DEEPER),
    "tp2 x pp2 x cp2": (8, TP2 | PP2 | CP2, DEEPER),
    "pp2 zero-bubble": (2, PP2 | layout(schedule="zero_bubble"), DEEPER),
}
DEEPSPEED = layout(engine="deepspeed", data_parallel_shard=2)
ZERO = {
    "deepspeed ZeRO-1": (2, DEEPSPEED | layout(zero_stage=1), DEEPER),
    "deepspeed ZeRO-3": (2, DEEPSPEED | layout(zero_stage=3), DEEPER),
}
