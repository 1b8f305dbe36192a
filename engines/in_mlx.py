"""Greedy text and logits of a model folder in mlx-lm. Needs mlx-lm and nothing else; usage: see `protocol.py`."""

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from protocol import main, versions


def answer(folder: str, request: dict) -> tuple[dict, dict]:
    # The folder brings a configuration class, by way of which transformers finds the tokenizer.
    model, tokenizer = load(folder, tokenizer_config={"trust_remote_code": True})
    found: dict = {**versions("mlx", "mlx-lm"), "prompt_ids": [], "tokens": [], "text": []}
    logits = {}
    for number, prompt in enumerate(request["prompts"]):
        ids = tokenizer.encode(prompt)
        steps = generate_step(mx.array(ids), model, max_tokens=request["new_tokens"])  # greedy without a sampler
        tokens = [int(token) for token, _ in steps]
        found["prompt_ids"].append(ids)
        found["tokens"].append(tokens)
        found["text"].append(tokenizer.decode(tokens))
        logits[str(number)] = model(mx.array([ids + tokens]))[0].astype(mx.float32)
    return found, logits


if __name__ == "__main__":
    main(answer, lambda logits, file: mx.save_safetensors(file, logits))
