"""Ranks 20 films for one real viewer, from Python: python examples/rank.py"""

from rcllm import Config, Engine, PromptConfig, RankOptions, build_requests, load_dataset

films = load_dataset("auto", "movielens")  # fetched once
[request] = build_requests(films, count=1, num_candidates=20, num_history=10)

config = Config(prompt=PromptConfig(template="movies"), rank=RankOptions(readout="likelihood"))
engine = Engine.build(films.catalogue, config)
seen = [event.item_id for event in request.history if event.item_id]
engine.warm(seen)  # else computed within the first request that needs them

response = engine.rank(request)
print("watched:", "; ".join(films.catalogue[item_id].fields["title"] for item_id in seen))
for place, index in enumerate(response.order[:5], 1):
    item = films.catalogue[response.candidates[index]]
    chosen = "  ← watched next" if item.item_id == request.positive else ""
    print(f"{place}. {response.scores[index]:.3f}  {item.fields['title']}{chosen}")
receipt = response.receipt
print(f"{receipt.num_reused} of {receipt.num_tokens} tokens reused, {receipt.stage_ms['total']:.0f} ms")
