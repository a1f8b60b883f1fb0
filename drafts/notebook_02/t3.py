import sys,torch; sys.path.insert(0,"data/results")
import lora_sweep as S
torch.set_num_threads(1)
from ftlab.pipeline import fast
fast.keep_memory()
from ftlab.pipeline.models import load
m,t=load("micro")
for task in("triage","codes","small"):
    tr,h=S.rows_of(task,t,1); print(task,len(tr),sum(len(r[0]) for r in tr)/len(tr),{n:(len(x),round(S.mean_loss(m,x),3)) for n,x in h.items()})
S.STEPS={"triage":10,"codes":10}
a=S.arms()
print(len(a)); 
for i in (3,10): print(a[i]["task"],a[i]["name"],S.run(a[i],1e-2,0))
