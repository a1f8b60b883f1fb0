import json,statistics as st
d=json.load(open("/work/main/data/results/lora_sweep.json"))
print(d["base"])
for a in d["arms"]:
    w="test" if a["task"]!="codes" else "validation"
    f=lambda k:(round(st.mean(r[k] for r in a["runs"]),3),round(st.stdev(r[k] for r in a["runs"]),3))
    print(a["task"],a["name"],a["runs"][0]["parameters"],"best",a["best_rate"],w,f(w),"train",f("train"),"text",f("text"),"facts",f("facts"))
    print("     search",{r["learning_rate"]:(round(r["validation"],3),round(r["text"],2)) for r in a["search"]})
