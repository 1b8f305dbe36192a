"""How vLLM runs here: few cores, a small model. Imported before vLLM, which reads some of it from the environment."""

import os

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process for the scheduler alone
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def options(tensor_parallel_size: int = 1, **others) -> dict:
    """Arguments of `vllm.LLM` for a small model in float32, and `others`. The folder's own configuration is code."""
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else "uni",
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "trust_remote_code": True,
        "seed": 0,
        **others,
    }
