p="/tmp/nb02/cells.py"; s=open(p).read()
def sub(a,b):
    global s
    assert s.count(a)==1,(a[:80],s.count(a)); s=s.replace(a,b)
sub('''pd.concat([by_arm[["parameters", "learning_rate"]].first(), by_arm["loss"].agg(["mean", "std"])], axis=1).loc[
    [(task, arm) for task in ("triage", "codes") for arm in shapes]]
''','''table = pd.concat([by_arm[["parameters", "learning_rate"]].first(), by_arm["loss"].agg(["mean", "std"])], axis=1)
table = table.loc[[(task, arm) for task in ("triage", "codes") for arm in shapes]]
untrained = pd.Series({"triage": sweep["base"]["triage"]["test"], "codes": 2.303})  # codes: knowing only that digits come
gain = untrained[table.index.get_level_values("task")].values - table["mean"]
table["share of full's gain"] = gain / gain.xs("full", level="arm")[table.index.get_level_values("task")].values
table
''')
open(p,"w").write(s)
