import json,sys,base64
nb=json.load(open(sys.argv[1])); k=0
for c in nb["cells"]:
    if len(sys.argv)>2 and c["cell_type"]=="markdown": print("---",c["id"]); print("".join(c["source"])); continue
    if c["cell_type"]!="code": continue
    print("=====",c["id"],"".join(c["source"])[:60].replace("\n"," | "))
    for o in c["outputs"]:
        if "text" in o: print("".join(o["text"])[:2500])
        elif o["output_type"]=="error": print("ERROR",o["ename"],o["evalue"][:600], "\n".join(o["traceback"])[-900:])
        else:
            if "image/png" in o["data"]:
                open(f"/tmp/nb02/fig_{c['id']}.png","wb").write(base64.b64decode(o["data"]["image/png"])); print("[fig]")
            elif "text/plain" in o["data"]: print("".join(o["data"]["text/plain"])[:2500])
