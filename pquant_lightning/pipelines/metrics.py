"""The metrics that need no code of the user's, with their units; a list that is there without torch."""

METRICS = {
    "accuracy": "share",
    "compression_ratio": "parameters before / after",
    "size": "bytes of the file",
    "params": "parameters",
    "macs": "MACs per sample",
    "latency": "ms per batch",
    "throughput": "samples/s",
    "peak_memory": "bytes",
    "output_error": "share",
    "output_cosine": "",
}
"""Name -> unit; see `EvaluationPipeline`."""
