p="/tmp/nb02/cells.py"; s=open(p).read()
def sub(a,b):
    global s
    assert s.count(a)==1,(a[:80],s.count(a)); s=s.replace(a,b)
sub('''kinds = {trainable: {str(p.dtype) for p in on_bf16.parameters() if p.requires_grad == trainable} for trainable in (True, False)}
''','''kinds = {trains: {str(p.dtype) for p in on_bf16.parameters() if p.requires_grad == trains} for trains in (True, False)}
''')
sub('''print({name: version for name, version in training.environment()["versions"].items() if name in ("peft", "trl", "unsloth", "torch")})
''','''versions = training.environment()["versions"]
print({name: versions.get(name) for name in ("torch", "transformers", "peft", "trl", "unsloth")})
''')
sub('''print(f"GPT-3, q,v r4: 2 x 96 x 4 x (12288 + 12288) = {gpt3:,}; the paper's 175,255.8 million over it: {175_255.8e6 / gpt3:,.0f}")
''','''print(f"GPT-3, q,v r4: 2 x 96 x 4 x (12288 + 12288) = {gpt3:,}, 1 in {175_255.8e6 / gpt3:,.0f} of the paper's 175,255.8 M")
''')
sub('''print(f"micro r{R}: {trainable:,} parameters x 4 bytes = {4 * trainable:,}; on disk {size:,} (names and shapes: {size - 4 * trainable:,})")
''','''print(f"micro r{R}: {trainable:,} parameters x 4 bytes = {4 * trainable:,}; on disk {size:,}, "
      f"of which names and shapes {size - 4 * trainable:,}")
''')
sub('''files = pd.DataFrame({name: {setting: 2 * trainable_parameters(architectures[name], *how) / 1e6 for setting, how in kinds.items()}
                      | {"the model": 2 * total_parameters(architectures[name]) / 1e6}
                      for name in ("SmolLM2-135M", "Llama-2-7B", "Llama-3-8B", "Llama-2-70B")}).T.rename_axis("MB in bf16")
''','''some = {name: architectures[name] for name in ("SmolLM2-135M", "Llama-2-7B", "Llama-3-8B", "Llama-2-70B")}
files = pd.DataFrame({name: {setting: 2 * trainable_parameters(a, *how) / 1e6 for setting, how in kinds.items()}
                      | {"the model": 2 * total_parameters(a) / 1e6} for name, a in some.items()}).T.rename_axis("MB in bf16")
''')
sub('''                         for arm in sweep["arms"] if arm["task"] == "triage" and arm["name"] in alphas for run in arm["search"]])
display(searched.pivot_table(index="learning rate", columns="arm", values="loss")[list(alphas.values())])
by_arm[["learning_rate", "loss"]].agg({"learning_rate": "first", "loss": ["mean", "std"]}).loc[[("triage", arm) for arm in alphas]]
''','''                         for arm in sweep["arms"] if arm["task"] == "triage" and arm["name"] in alphas
                         for run in arm["search"]])
display(searched.pivot_table(index="learning rate", columns="arm", values="loss")[list(alphas.values())])
by_arm.agg({"learning_rate": "first", "loss": ["mean", "std"]}).loc[[("triage", arm) for arm in alphas]]
''')
sub('''check.close([my_alpha(64, False), my_alpha(64, True)], [128, 64], hint="scaling is alpha / r, or alpha / sqrt(r); keep it equal.")
''','''check.close([my_alpha(64, False), my_alpha(64, True)], [128, 64],
            hint="scaling is alpha / r, or alpha / sqrt(r) with rsLoRA; keep it equal.")
''')
open(p,"w").write(s)
