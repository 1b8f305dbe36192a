"""Speed of GGUF files in llama.cpp; usage: see `interleave.py`. The request's options: "threads"."""

from interleave import PROMPT, Workloads, main
from llama_cpp import Llama
from protocol import versions

NEW_TOKENS, PREFILL = 16, 64


def workloads(model: Llama) -> Workloads:
    def decode() -> None:
        model.reset()
        for number in range(NEW_TOKENS):
            model.eval(PROMPT[number : number + 1])

    def prefill() -> None:
        model.reset()
        model.eval(PROMPT * (PREFILL // len(PROMPT)))

    return {"decode, 1 sequence": (NEW_TOKENS, decode), f"prefill, {PREFILL} tokens": (PREFILL, prefill)}


def load(file: str, options: dict) -> Llama:
    threads = options["threads"]
    return Llama(file, n_ctx=128, n_threads=threads, n_threads_batch=threads, verbose=False)


if __name__ == "__main__":
    main(load, workloads, versions("llama-cpp-python"))
