"""Ranks 20 films for one real viewer, from Python: python examples/rank.py"""

from rcllm import Config, Engine, Level, PromptConfig, RankOptions, build_requests, load_dataset

films = load_dataset("auto", "movielens")  # fetched once
[request] = build_requests(films, count=1, num_candidates=20, num_history=10)

# the default level is exact until `rcllm calibrate` says that more may be reused; here all of it is, to show what is
options = RankOptions(level=Level("blocks"), readout="likelihood")
config = Config(prompt=PromptConfig(template="movies"), rank=options)
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
