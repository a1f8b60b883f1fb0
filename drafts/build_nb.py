"""text -> ipynb: build_nb.py in.txt out.ipynb"""
import json,re,sys
text=open(sys.argv[1]).read(); cells=[]
for part in re.split(r'(?m)^# %% ',text)[1:]:
    head,_,body=part.partition('\n'); words=head.split(); kind,id,flags=words[0],words[1],words[2:]
    body=body.strip('\n'); meta={}
    if 'hidden' in flags: meta['jupyter']={'source_hidden':True}
    tags=[f[4:] for f in flags if f.startswith('tag=')]
    if tags: meta['tags']=tags
    src=body.splitlines(keepends=True)
    c={'cell_type':'markdown' if kind=='md' else 'code','id':id,'metadata':meta,'source':src}
    if kind=='code': c|={'execution_count':None,'outputs':[]}
    cells.append(c)
nb={'cells':cells,'metadata':{'kernelspec':{'display_name':'Python 3 (ipykernel)','language':'python','name':'python3'},'language_info':{'name':'python'}},'nbformat':4,'nbformat_minor':5}
json.dump(nb,open(sys.argv[2],'w'),indent=1,ensure_ascii=False); open(sys.argv[2],'a').write('\n')
code=[c for c in cells if c['cell_type']=='code']
print(len(cells),'cells',len(code),'code')
for c in code:
    n=len(c['source']); w=max(map(len,c['source']),default=0)
    if (n>15 or w>101) and not c['metadata'].get('jupyter'): print('TOO BIG',c['id'],n,w)
