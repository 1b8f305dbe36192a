"""Greedy text and logits of a model folder in transformers, by the folder's own code; usage: see `protocol.py`."""

from importlib.util import find_spec

import torch
from protocol import main, versions
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def answer(folder: str, request: dict) -> tuple[dict, dict]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found: dict = {**versions("transformers", "torch"), "prompt_ids": [], "tokens": [], "text": []}
    found.update(model_class=type(model).__name__, fxfusion_installed=find_spec("fxfusion") is not None)
    logits = {}
    for number, prompt in enumerate(request["prompts"]):
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        written = model.generate(**inputs, max_new_tokens=request["new_tokens"], do_sample=False)
        new = written[0, length:]
        found["prompt_ids"].append(inputs["input_ids"][0].tolist())
        found["tokens"].append(new.tolist())
        found["text"].append(tokenizer.decode(new))
        logits[str(number)] = model(written).logits[0].contiguous()
    return found, logits


if __name__ == "__main__":
    main(answer, save_file)
