"""Markdown cells of a draft into the executed notebook; code must be the same."""
import json,sys,subprocess,tempfile,os
draft,nbp=sys.argv[1:]
tmp=tempfile.mktemp(suffix='.ipynb'); subprocess.run([sys.executable,'/tmp/w/build_nb.py',draft,tmp],check=True,stdout=subprocess.DEVNULL)
new=json.load(open(tmp)); nb=json.load(open(nbp)); n=0
assert [c['id'] for c in new['cells']]==[c['id'] for c in nb['cells']]
for a,b in zip(new['cells'],nb['cells']):
    if a['cell_type']=='code':
        if ''.join(a['source'])!=''.join(b['source']): print('CODE DIFFERS',a['id'])
    elif a['source']!=b['source']: b['source']=a['source']; n+=1
json.dump(nb,open(nbp,'w'),indent=1,ensure_ascii=False); open(nbp,'a').write('\n'); print(n,'markdown cells')
