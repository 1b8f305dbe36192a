"""Greedy text and logits of GGUF files in llama.cpp. Needs llama-cpp-python and safetensors; usage: see `protocol.py`.

A request may have "ids" (lists of token ids) in place of "prompts": then nothing is written, and the logits are theirs.
"""

from llama_cpp import GGML_TYPE_F32, Llama
from protocol import main, versions
from safetensors.numpy import save_file


def answer(file: str, request: dict) -> tuple[dict, dict]:
    # Keys and values in float32: as float16, which is its default, logits are off by some hundredths.
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(file, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **cache)
    found: dict = {**versions("llama-cpp-python"), "prompt_ids": [], "tokens": [], "text": []}
    logits = {}
    asked = request.get("ids") or [model.tokenize(prompt.encode(), special=True) for prompt in request["prompts"]]
    for number, ids in enumerate(asked):
        model.reset()
        model.eval(ids)
        tokens = []
        for _ in range(0 if "ids" in request else request["new_tokens"]):
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        found["prompt_ids"].append(ids)
        found["tokens"].append(tokens)
        found["text"].append(model.detokenize(tokens).decode(errors="replace") if tokens else "")
        logits[str(number)] = model.scores[: model.n_tokens].copy()
    model.close()
    return found, logits


if __name__ == "__main__":
    main(answer, save_file)
