import time, sys, torch
torch.set_num_threads(1)
from ftlab.pipeline.models import load
from ftlab.pipeline import fast
from ftlab.scratch.lora import add_lora
fast.keep_memory()
r,lr,K,D,steps,bs=int(sys.argv[1]),float(sys.argv[2]),*map(int,sys.argv[3:7])
ALL=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]
model,tok=load("micro")
g=torch.Generator().manual_seed(0)
keys=torch.randperm(1000,generator=g)[:K]
dig=torch.tensor([tok.convert_tokens_to_ids(str(i)) for i in range(10)])
vals=torch.randint(0,10,(K,D),generator=g)
kd=torch.stack([keys//100,keys//10%10,keys%10],1)
pre=tok("Order")["input_ids"]; mid=tok(" is")["input_ids"]
ids=torch.cat([torch.tensor(pre).repeat(K,1),dig[kd],torch.tensor(mid).repeat(K,1),dig[vals]],1)
print(ids.shape)
def loss(x):
    h=model.model(input_ids=x,use_cache=False).last_hidden_state[:,-D-1:-1]
    return torch.nn.functional.cross_entropy(model.lm_head(h).flatten(0,1), x[:,-D:].flatten())
torch.manual_seed(0)
if r: add_lora(model,ALL,r,2*r)
ps=[p for p in model.parameters() if p.requires_grad]
opt=torch.optim.AdamW(ps,lr=lr,weight_decay=0)
t=time.process_time()
for s in range(steps):
    for gr in opt.param_groups: gr["lr"]=lr*min(1,(s+1)/5)
    b=torch.randperm(K)[:bs]
    l=loss(ids[b]); l.backward(); torch.nn.utils.clip_grad_norm_(ps,1.0); opt.step(); opt.zero_grad()
    if s%20==0 or s==steps-1: print(s,round(l.item(),3),end=" ")
print(r,lr,"sec/step",(time.process_time()-t)/steps)
