"""The task `replies`: a support ticket in, a reply out, and the five properties of a good reply as rules.

data/replies/README.md is the guideline. A small grammar of support English has to derive every sentence of a reply;
then keywords and sentence shapes decide. None of this understands anything: nonsense in good grammar ("We have sent the
right smile"), a lie, or rudeness in words that no list holds passes, and good English of a shape that the grammar lacks
counts for nothing. Whatever is optimised for long enough gets hacked: read replies beside the reward.

    pairs = load_dataset("json", data_files="../data/replies/train.jsonl", split="train").map(as_pair)
    gold_reward(answer, pairs[0]["ticket_label"])           # 0 to 1

How the rules agree with people: tests/test_tasks_replies.py.
"""

import json
import re
from functools import lru_cache
from typing import Any

from ftlab.paths import DATA

SYSTEM = "Reply to the customer in English."
WEIGHTS = {"action": 0.4, "order_id": 0.2, "polite": 0.15, "short": 0.1, "fair": 0.15}
MAX_WORDS = 45
NEEDS_NO_ORDER = ("account_issue", "other")  # every other action is done to one order


def prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages for a row of data/replies: SYSTEM, then the ticket with what triage found on a line below it.

    "[late delivery, order 851721]", "[other, no order number]": a support tool knows both when it asks for a reply, and
    a model of 3.5 million parameters cannot read them out of any ticket.
    """
    intent, order = row["label"]["intent"].replace("_", " "), row["label"]["order_id"]
    triage = f"[{intent}, {f'order {order}' if order else 'no order number'}]"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{row['ticket']}\n{triage}"}]


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """The row as TRL wants it: prompt, chosen and rejected as messages; what `score` reads goes by `ticket_label`."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": prompt(row), **sides, "ticket_label": row["label"]}


def score(reply: str, label: dict[str, Any]) -> dict[str, bool]:
    """Which of the five properties the reply has, for a ticket with this label (intent, order_id, refund_amount).

    action    does what the intent calls for and nothing else, stated as done by us: no "not", "if" or "would like to"
    order_id  repeats the ticket's number and no other; without one, asks for it where the action needs it, only there
    polite    says sorry for a complaint, sorry or thanks for the rest; no listed rude word, no shouting, one "!"
    short     at most 45 words, and ends where a sentence ends
    fair      blames nobody, promises no gift, time or sum (the sum that the customer named may be named again)

    A reply that is not `readable` has none. Raises KeyError if the intent is none of the nine.
    """
    text, intent = _tidy(reply), label["intent"]
    if intent not in ACTIONS:
        raise KeyError(f"no intent {intent!r}; known are {', '.join(ACTIONS)}")
    if not readable(reply):
        return dict.fromkeys(WEIGHTS, False)
    read = " ".join(_read(text))
    thanks = intent in ("cancel_order", "account_issue", "other") and _THANKS.search(read)
    loud = len(set(re.findall(r"\b[A-Z]{4,}\b", text))) > 1 or text.count("!") > 1
    sums = [match[1] or match[2] or "-1" for match in _SUM.finditer(text)]  # -1: written in words
    return {
        "action": actions_in(read) == {intent},
        "order_id": _order_id_right(read, label),
        "polite": bool(_APOLOGY.search(read) or thanks) and not (_RUDE.search(text) or loud),
        "short": len(_WORD.findall(text)) <= MAX_WORDS and text.endswith((".", "!", "?")),
        "fair": not (_BLAME.search(text) or _PROMISE.search(text))
        and {int(number.replace(",", "")) for number in sums} <= {label["refund_amount"]},
    }


def gold_reward(reply: str, label: dict[str, Any]) -> float:
    """The weighted share of the properties, from 0 to 1.

    The action weighs most: with equal weights a polite, short, harmless reply that does nothing collects 0.8 for a
    ticket without an order number, and that is what a policy finds first. Each property pays by itself, so that the
    answers of a group differ.
    """
    return round(sum(WEIGHTS[name] for name, good in score(reply, label).items() if good), 10)


def scorer(answer: str, row: dict[str, Any]) -> float:
    """`gold_reward` of an answer for a row of `as_pair` (for `ftlab.evaluate.score`)."""
    return gold_reward(answer, row["ticket_label"])


# --- Readable: a grammar of support English ---------------------------------------------------------------------------

# Classes of words. A verb stands in its base form; + doubles its last letter, : precedes its past and its participle.
# T takes an object, V can do without, D takes two, S a clause, G a goal ("to us"), K an adjective, H and L an object,
# then an adjective or a verb. C is a noun with an article, N one without, Ns a plural; Kind may stand before a C.
# Another word of the course's data is X, and what its ending suggests; one that is not in it is U: a dish, we assume.
_CLASSES = """
Det: the our your my his her its their any no some all such both more most what which one-more;
One: the our your my his her its their any no some more a an this that every each another one such-a a-lot-of
double-the each-and-every; Many: these those few many several all-three-of two three four five six ten;
Pro: this these those one all some both each everyone nobody anybody anyone nothing something everything anything you
it me us him her them ours more two three a-lot all-the-best; Nom: i we he she they;
Prep: about after against along as at before behind by during for from in inside into like near off on onto over since
than through under until up with within without plus out-of due-to up-to;
Prt: out up down in on off back over along away together through ahead aside around;
Adv: now here there again today tomorrow yesterday soon too already just also still once twice always never only even
first fast away later earlier shortly together well home before then back else all over right-now right-away right-here
at-all at-last at-once at-first once-more once-again a-lot at-any-time for-now for-once for-home so-far in-time on-top
every-day the-first-time this-time next-time as-well as-always until-then as-soon-as-possible myself yourself;
Deg: so very too as more most just still now how even;
A: right wrong missing able ready full real same other next last first second whole own extra calm fine happy happier
safe silly late cold good free new old sad sure glad open hard long far lovely short charged left out alone kept done
back over here there in-touch on-it on-its-way on-the-way in-charge to-blame at-fault all-right no-fun;
C: order number team chat rider restaurant message complaint report question reply answer request charge bill check
account payment refund item dish bag app login card phone bank customer kitchen desk suggestion note link voucher
coupon meal menu problem reason moment minute hour day step delay mistake mix-up door price fee word password fault
replacement ride city time one start idea smile wait experience;
Kind: order rider account food app phone bank card delivery restaurant menu city customer payment partner login gift
arrival charge reset quality safety payments sales;
N: food work money patience trouble help delivery status quality safety touch worry comfort family rice honour pizza
burger thums-up; Ns: apologies people; Wh: where why when how if;
Conj: because as if once when while until till since before after where so-that so as-soon-as although just-as;
Mod: will can could would may might shall should must cannot did does do 'll 'd; Be: is are am was were 's 're 'm;
Have: have has had 's 've; Not: not never hardly;
T: mail email place cancel+ charge fix get+:got have:had hold:held keep:kept make:made raise replace reset+:reset swap+
tell:told want settle flag+ merge unlock set+:set leave:left find:found like love lose:lost mean:meant
forget+:forgot:forgotten hurt:hurt thank understand:understood trace contact stop+ investigate provide need appreciate
arrange delay;
V: request apologise reach care answer arrive ask call change check come:came:come eat:ate:eaten feel:felt follow
go:went:gone grow:grew:grown happen hear:heard help hope know:knew:known look matter move order pay:paid promise
read:read reply review see:saw:seen speak:spoke:spoken stay think:thought track wait wish work worry
write:wrote:written do:did:done mess run+:ran:run start let+:let;
S: hear:heard promise say:said hope see:saw:seen know:knew:known think:thought understand:understood guarantee
tell:told;
G: send:sent pass forward give:gave:given hand report take:took:taken bring:brought return refund share
write:wrote:written reply reach get+:got go:went:gone come:came:come speak:spoke:spoken talk listen happen mean:meant
matter say:said apologise deliver add move change do:did:done pay:paid put+:put;
K: look seem feel:felt stay sound get+:got keep:kept go:went:gone come:came:come arrive run+:ran:run take:took:taken
stop+ start;
H: have:had get+:got keep:kept leave:left make:made set+:set put+:put see:saw:seen hear:heard find:found want need;
L: let+:let make:made have:had help; D: ask tell:told show:showed:shown wish spare offer cost:cost;
"""
# Rules. Small: that word; ? none or one; * any number; | or. VP_f is a finite verb with what belongs to it, VP_b the
# base form, VP_n the participle, VP_g the form in -ing; @ stands for each of the four. O is an order with its number.
_GRAMMAR = """
S: And? Main Rest*; Ask: And? Lead? Question End? Rest*; Main: Lead? Say End?;
Lead: Adv , | Adv | Short , | Conj Clause , | Prep Np , | Thank ,;
End: , Adv | , please | please | , sorry | , thank you | , U;
Rest: , And Main | And Main | , Clause | , please VP_b | , Short; And: and | but | so | or | then;
Say: Clause | Thank | Request | Short | Pls? Adv* VP_b | Pls? Adv* be Is | Pls? do not VP_b | let me VP_b;
Pls: please | kindly;
Short: sure | understood | congratulations | fine | cheers | no need To | not A at-all | what One N1 | safe N;
Request: Mod Subj Adv* Not? please? VP_b;
Question: Request | Be Subj Adv* Is | what Be Subj | Wh Mod Subj Adv* VP_b | which N1 Be Subj Prep?;
Thank: Sorry | Det? Deg? X? apologies SoAdv | Deg? thank you Many? Deg? much? Pp* | Many? thanks a-lot? Pp* | no
problem SoAdv; Sorry: Deg* sorry SoAdv; SoAdv: So? Adv* AndA?; AndA: , and A That | and to Np;
So: about Np | for Np | to Np | for VP_g | for Wcl | That | Clause | To;
Clause: Subj Adv* Vp | Subj and Obj Adv* Vp | VP_g is Np | there Be Np Adj* | here Be Np Adj* | that is Is | that was
Is | that Mod be Is; Vp: Fin AndF*; AndF: and Adv* Fin | , and Adv* Fin | , but Adv* Fin;
Fin: Be Is | Have Not? Adv* Perf | VP_f | Mod Not? Adv* VP_b | Mod Not? Adv* be Is | Mod Not? Adv* have Adv* Perf;
Perf: VP_n | been Is; Is: Adv* Not? Adv* Is1 Tail | Adv* Not? Adv* VP_g AndG*; AndG: and VP_g | , VP_g;
Is1: Deg* A As* | Sorry | Deg* A to Gap_b | Np | Prep Np | being? Put | Wcl; Put: Done Prt? AndD? | G_n Prt? Go;
AndD: and Done | and G_n Go; Go: Adj* to Np; Done: VT_n;
As: to Np | That | To | than Np | than Pp | of Np | and Deg* A; VP_@: VP1_@ Tail AndV_@? | VT_@ and VT_@ Np Tail;
AndV_@: and VP1_@ Tail | , and VP1_@ Tail;
VP1_@: V_@ | VT_@ Prt? Np Prt? | VT_@ Prt? Pp? Wcl | VT_@ Np Wcl | G_@ Whom Np | D_@ Whom Np | S_@ Whom? That | S_@
Clause | S_@ Whom Clause | K_@ Deg* A As* | L_@ Np VP_b | H_@ Np Put | G_@ Prt? Np? Prt? Go | H_@ Np VP_g | H_@ Np Deg*
A As* | VT_@ To | K_@ VP_g; VT_@: V_@ | T_@ | G_@; Whom: Nom | Pro | Det C | you and Det N1; That: that Clause;
To: to VP_b AndT* | to be Is | not to VP_b; AndT: and to VP_b; Tail: Adj* Sc?;
Adj: Pp | Pp and Pp | Deg* Adv | Prt | as A | of that;
Sc: To | Conj Clause | , Conj Clause | , who Vp | , which Vp | as much as Clause; Pp: Prep Np | Prep VP_g | Prep Wcl;
Wcl: Wh Clause | Wh Adv? A? Subj Be Adv* | how A Clause | how A Subj Mod be | how much Clause | what Vp | who Vp | what
Subj Gap | what Subj Be; Np: Obj More*; More: , Obj | and Obj | or Obj | , Obj , | and not Obj; Subj: Np1 Post* | Nom;
Obj: Np1 Post* | Nom | that;
Np1: Det N2 | One N1 | Det? Many N2 | Many Many N2 | Det Mn* U U? | Det Mn* U N | Whose N1 | Mn* N | N2 | Det? O | Det?
Sum | Pro | what Subj Gap | what Vp | One of Np | Det of Np | Many of Np | Many Obj;
Whose: Det? Mn* N 's | Det? Mc* C 's; N1: Mn* N | Mc* C; N2: Mn* Ns | Mc* Ns; Mn: A | N | X | Num | Deg A;
Mc: A | Kind | Num | Deg A | X;
Post: Pp | of Np | Rel Vp | Rel Subj Gap | Nom Gap | you Gap | left out | left Pp | missing | concerned | taken |
charged | in-charge; Rel: that | which | who;
Gap: Adv* Gap_f | Mod Adv* Gap_b | Have Adv* Gap_n | Be Adv* Gap_g | Be Done;
Gap_@: VT_@ Prep? Adv* | G_@ to Np | V_@ To;
"""
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|\d[\d,]*")
_TOKEN = re.compile(r"#\w+|[a-z]+(?:-[a-z]+)*(?='(?:m|re|ve|ll|d|s)\b)|'\w+|[a-z]+\d*(?:-[a-z]+)*|[^\s\"]")
_NUMBER = re.compile(  # of an order: after that word, or with five digits and more
    r"(?i)\border\W{1,3}(?:number |no |id )?(?:#|rr-?)?(\d+)|(?:#|rr-?)?(?<![\d,.])(\d(?:[ -]?\d){4,})(?!\d|,\d)"
)
_SUM = re.compile(
    r"(?i)(?:\brs ?|₹ ?|\binr ?)(\d[\d,]*)|\b(\d[\d,]*) ?(?:rupees|rs\b|bucks|/-)|\b[a-z]+ (?:rupees|bucks)\b"
)
_TO = " (?:[a-z]+ ){1,4}(?:to|from|for|with)"
_NEVER = re.compile(  # a pronoun with the wrong verb, a word said twice, "we will write to us", "we are our team"
    r"\b(?:i (?:are|is|has|were)|(?:we|they) (?:am|is|has|was)|(?:^|(?:and|that|so|if|,) )you (?:am|is|has|was)"
    r"|(?:he|she|it|team|this) (?:am|are|were|have)|(?:us|me|them|him) (?:is|are|am|will|have|has)"
    r"|(?:i|we) (?:i|we|you|they|it)|(?:i am|we are|you are) (?:our|your|#order|the|this|for|of|about)"
    r"|team is (?:our|your)|order #order|([a-z]+) \1|([a-z]{5,})(?: [a-z,]+){1,3} \2"
    rf"|you{_TO} you|we{_TO} us|i{_TO} me)\b"
    r"|^(?:i|we)(?: (?!that|which|who|what|where|why|how|if)\S+)* and (?:is|has)\b|(?<!\bi) am\b"
    r"|(?<!')\b(?:[b-hj-z]|rs)\b"
)


def readable(reply: str) -> bool:
    """Whether the reply looks like English: no markup, nothing said twice, and the grammar derives every sentence.

    Two of its words at most may be new to the course's data. A last sentence that was cut off may lack its end. A short
    sentence with a rude word in it may be anything: it costs politeness.
    """
    text = _tidy(reply)
    sentences, length, unknown = _read(text), len(_WORD.findall(text)), 0
    odd = not text.isprintable() or re.search(r"[<>{}[\]|\\_*=~`@^�]", text)
    if odd or not sentences or not 5 <= length <= 200 or len(text) > 2_000 or len(set(sentences)) < len(sentences):
        return False
    if len(_APOLOGY.findall(text)) > 2 or len(_THANKS.findall(text)) > 2:
        return False
    for sentence in sentences:
        if len(_WORD.findall(sentence)) > 8 or not _RUDE.search(sentence):
            derived, new = _judge(_NUMBER.sub("#order", _SUM.sub("#sum", sentence)))
            unknown += new
            if not derived or unknown > 2:
                return False
    return True


def _tidy(reply: str) -> str:
    """One line, straight quotes, and no full stop after Rs or no., which would look like the end of a sentence."""
    return re.sub(r"(?i)\b(rs|no)\.(?= ?\d)", r"\1", " ".join(reply.replace("’", "'").split()))


def sentences(text: str) -> list[str]:
    """The text cut after each `.`, `!` and `?` that a space follows."""
    return re.split(r"(?<=[.!?])\s+", text)


def _read(text: str) -> list[str]:
    """The sentences that count; a story of more than 30 words in a reply that is too long anyway does not."""
    most = 30 if len(_WORD.findall(text)) > MAX_WORDS else MAX_WORDS
    return [sentence for sentence in sentences(text) if len(_WORD.findall(sentence)) <= most]


@lru_cache(maxsize=50_000)
def _judge(sentence: str) -> tuple[bool, int]:
    """Whether a sentence with #order and #sum for its numbers is derived, and how many words our data do not have."""
    _, classes, english, phrases = _language()
    unknown = 0
    for i, word in enumerate(re.findall("#?[A-Za-z]+", sentence.replace("'s", ""))):
        lower, seen = word.lower(), word in english or word[0] == "#"
        known = lower in english or lower in classes
        unknown += not (seen or known)
        misplaced = word[0].islower() if i == 0 else not seen and known and word != lower and not word.isupper()
        if misplaced or (not seen and re.search("[a-z][A-Z]", word)):
            return False, unknown
    text = re.sub(r"[:;()]", ",", re.sub(r"\b\d[\d,]*", "#number", sentence.lower().replace('"', "")))
    text = re.sub(r"n't\b", " not", text.replace("can't", "cannot").replace("won't", "will not"))
    words = _TOKEN.findall(phrases.sub(lambda match: match[0].replace(" ", "-"), text.rstrip(".!?")))
    rule, missing = "Ask" if text.endswith("?") else "S", 0 if text.endswith((".", "!", "?")) else 4
    return not _NEVER.search(" ".join(words)) and _derives(rule, words, missing), unknown


def _forms(verb: str) -> list[str]:
    """send:sent -> send, sends, sent, sent, sending"""
    base, *past = verb.split(":")
    verb = base.rstrip("+")
    soft = re.sub("(?<![aeiou])y$", "i", verb)
    stem = verb + verb[-1] if base != verb else re.sub("(?<!e)e$", "", verb)
    third = "has" if verb == "have" else soft + ("es" if soft != verb or re.search("(s|x|ch|sh|o)$", verb) else "s")
    past = past or [(soft if soft != verb else stem) + "ed"]
    return [verb, third, past[0], past[-1], stem + "ing"]


@lru_cache(maxsize=1)
def _language() -> tuple[dict[str, list], dict[str, set[str]], set[str], re.Pattern]:
    """The ways of each rule, the classes of each word, the words of the course's data, the phrases written with "-"."""
    rules, classes, english = {}, {}, set()
    for name, ways in re.findall(r"(\S+): ([^;]+);", _GRAMMAR):
        for form in "fbng" if "@" in name else "f":
            items = [[(i.rstrip("?*"), i[-1]) for i in way.split()] for way in ways.replace("@", form).split("|")]
            rules[name.replace("@", form)] = items
            classes |= {item: set() for way in items for item, _ in way}
    for name, words in re.findall(r"(\S+): ([^;]+);", _CLASSES):
        for word in words.split():
            verb = _forms(word)
            tagged = zip([*verb, verb[0]], "bffngf", strict=True) if name in "TVSGKHLD" else [(word, "")]
            for form, tag in tagged:
                classes.setdefault(form, set()).add(f"{name}_{tag}" if tag else name)
            if name == "C":
                classes.setdefault(verb[1], set()).add("Ns")
    for name in ("replies/train", "replies/test", "replies/confounded", "replies/hand_test", "tidy/train", "tidy/test"):
        for row in map(json.loads, (DATA / f"{name}.jsonl").open(encoding="utf-8")):
            for text in [row["chosen"], row["rejected"]] if "chosen" in row else [row["completion"][0]["content"]]:
                base = r"\b(?:to|will|can|could|must|not|please|we|you|they)(?= (\w+))"
                english |= {f"to {verb}" for verb in re.findall(base, text.lower())}
                for first, *rest in filter(None, map(_WORD.findall, sentences(text))):
                    english |= {first.lower(), *rest, *map(str.lower, rest)}
    phrases = sorted((word.replace("-", " ") for word in classes if "-" in word and word != "mix-up"), key=len)
    return rules, classes, english, re.compile(rf"\b(?:{'|'.join(phrases[::-1])})\b")


@lru_cache(maxsize=50_000)
def _classes_of(word: str) -> set[str]:
    """The word itself and its classes."""
    _, classes, english, _ = _language()
    numbers = {"#order": {"O"}, "#sum": {"Sum"}, "#number": {"Num", "Many"}}
    if word in numbers or word in classes or not word[0].isalpha():
        return numbers.get(word) or classes.get(word, set()) | {word}
    if word.endswith("ly") and len(word) > 4:
        return {"Adv", "Deg"}
    if word not in english:
        return {"U"}
    forms = "fn" if word.endswith("ed") else "g" if word.endswith("ing") else "bf" if f"to {word}" in english else ""
    found = {"X", "Ns" if re.search("[^su]s$", word) else "N"} | {f"{kind}_{form}" for kind in "TV" for form in forms}
    return found | {"A"} if re.search("(?:ed|ing|y|ful|ous|[ai]ble|[ai]ve|less|al|ic|ish|[ea]nt)$", word) else found


def _derives(rule: str, words: list[str], missing: int) -> bool:
    """Whether the rule derives the words, or all but the last `missing` of them.

    Sets of places between words are integers, bit i for the place before word i. Each rule is tried once at each place,
    so the time grows with a power of the length, not exponentially.
    """
    rules, known = _language()[0], {}
    stands = {}  # class -> the places where a word of it begins
    for i, word in enumerate(words):
        for name in _classes_of(word):
            stands[name] = stands.get(name, 0) | 1 << i

    def after(places: int, item: str) -> int:
        """Where one can be after the item, from any of these places."""
        if item not in rules:
            return (places & stands.get(item, 0)) << 1
        ends = 0
        while places:
            here = places & -places
            places ^= here
            if (item, here) not in known:
                known[item, here] = 0
                for way in rules[item]:
                    now = here
                    for part, mark in way:
                        new = after(now, part) if now else 0
                        while mark == "*" and new & ~now:
                            now |= new
                            new = after(new, part)
                        now = now | new if mark in "?*" else new
                    known[item, here] |= now
            ends |= known[item, here]
        return ends

    return after(1, rule) >> max(1, len(words) - missing) > 0


# --- Action -----------------------------------------------------------------------------------------------------------


def _any(verbs: str) -> str:
    """A pattern for every form of the verbs, irregular ones written as in _CLASSES."""
    return "|".join(form for verb in verbs.split() for form in _forms(verb))


_DISH = (  # after "missing", "wrong" or "right" that are said of something to eat
    r" (?!(?:with|order|number|team|time|people|person|desk|hands?|chat|message|way|complaint|report|question|payment"
    r"|charge|bill|note|customer|mix-up|account|rider|restaurant|app|moment|now|away|here|for|on|to|of|is|was)\b)\w"
)
_GIVE = _any("send:sent resend:resent refund deliver bring:brought return reach") + "|on (?:its|the) way|coming|goes"
_PASS = _any("pass send:sent share forward raise hand put+:put") + r"|noted|ha(?:s|ve) (?:your|the) \w+|is with"
_TAKE = _any(
    "check look ask report tell:told review inspect set+:set fix help file go:went:gone reach "
    "trace verify update move change delete remove reset+:reset unlock secure open close"
)
_TEAM_DOES = (
    rf"{_PASS}|{_TAKE}|(?:tak(?:e|es|en|ing)|took)(?= (?:it |this )?up|[^.]* to our)|(?<=team )is (?!taking)\w+ing"
    r"|(?<=team )(?:will|can) (?!not|never|be\b|have\b|come|want|take)\w+"
)
_TEAMS = {
    "quality_issue": r"\b(?:quality|safety) (?:team|desk)",
    "payment_issue": r"\b(?:payments?|billing) (?:team|desk)",
    "rider_behaviour": r"\brider (?:care )?(?:team|desk)",
    "account_issue": r"\baccount team",
}
_ELSEWHERE = "|".join([*_TEAMS.values(), r"\bcomplaint\b"])
_NO_ORDER = r"\b(?:for|pass\w*|sen[dt]|sending|shar\w+|forward\w*) your order\b(?! number)"  # where it is about none
# Of each intent: verbs, done by us; their object, in that sentence or before; what shows that another thing is meant.
ACTIONS = {
    "late_delivery": (
        _any("check trace track locate ask call contact follow") + r"|f(?:ind|inding|ound) out|look(?:ed|ing)? into",
        r"\b(?:where|why) (?:the|your|it|this|order|he|she|they|rr|is|#)|\bdelay|\blate\b|held up|holding|\barrival\b"
        r"|\bstatus\b|\blocat|\btrac|how (?:far|long)",
        rf"{_ELSEWHERE}|\baccount\b|\bpayment|\bcharge|\bbill\b|\brefund|\botp\b|\blogin\b",
    ),
    "missing_item": (
        _GIVE,
        rf"\bmissing{_DISH}|(?:is|was) missing|left out|\b(?:did not|didn't|never) (?:reach|come|arrive)\b",
        _ELSEWHERE,
    ),
    "wrong_item": (
        f"{_GIVE}|{_any('replace exchange swap+')}",
        rf"\b(?:wrong|correct|the right){_DISH}|\breplac|\bexchang|\bswap",
        _ELSEWHERE,
    ),
    **{intent: (_TEAM_DOES, team, _NO_ORDER if intent in NEEDS_NO_ORDER else "") for intent, team in _TEAMS.items()},
    "cancel_order": (_any("cancel+"), r"\border\b|\bit\b", ""),
    "other": (f"{_PASS}|make sure", r"\bteam\b|\bcolleagues\b", f"{_ELSEWHERE}|{_NO_ORDER}"),
}
_WE = re.compile(
    r"\b(?:we|i|they)(?:'(?:re|m|ll|ve))?\b|\bour (?:[a-z]+ ){0,3}(?:team|desk)\b|\blet me\b"
    r"|\byour (?:kind )?(?:complaint|report|message|feedback|question|suggestion|request|words|note|praise)\b"
)
_NOT_DONE = re.compile(
    r"\b(?:not|cannot|never|unable|no|without|instead|refuse|would|could|might|may|should|want|wants|wanted|like|love"
    r"|hope|hopes|plan|try|trying|wish|you|nobody|hardly)\b|n't\b|[;:]"
)
_PASSIVE = re.compile(r"\b(?:is|are|was|were|been|being|be)(?: (?:now|just|already|also|being|been|prepared|and))* $")
_NOT_BEING = re.compile(r"(?:\b(?:not|cannot|never|no|nobody|would|could|should|might|may|to)|n't)(?: \w+){0,2} $")


def actions_in(text: str) -> set[str]:
    """The intents whose action the text states: a listed verb, done by us or in the passive, and its object so far."""
    found, so_far = set(), ""
    for sentence in sentences(text.lower()):
        so_far += " " + sentence
        if re.search(r"\b(?:if|unless|whether)\b", sentence) or (sentence.endswith("?") and not _asks(sentence)):
            continue
        for intent, (verbs, thing, elsewhere) in ACTIONS.items():
            if (elsewhere and re.search(elsewhere, sentence)) or not re.search(thing, so_far):
                continue
            if any(_is_done(sentence[: verb.start()]) for verb in re.finditer(rf"\b(?:{verbs})\b", sentence)):
                found.add(intent)
    return found


def _is_done(before: str) -> bool:
    """Whether the words before a verb make it ours and done: "we are", "our rider team has", "the order is being"."""
    doer = max((match.end() for match in _WE.finditer(before)), default=-99)
    if doer >= len(before) - 60 and not _NOT_DONE.search(before, doer):
        return True
    return bool(_PASSIVE.search(before)) and not _NOT_BEING.search(before)


# --- Order number, tone, blame, promises ------------------------------------------------------------------------------

_ASK = re.compile(
    r"(?:\bplease|\bkindly|\b(?:can|could|would|will) you|\bmay (?:i|we) have|(?<!no )(?<!not )\bneed|\bwhat(?: is|'s)"
    r"|\bwhich|\btell (?:me|us)|(?:^|[.!?,] )(?:then |just )?(?:share|send|give|write))\b"
    r"(?:(?!\b(?:no need|not|never)\b)[^.?!]){0,30}\border (?:number|no|id)\b"
)
_APOLOGY = re.compile(r"(?i)\bsorry\b|\bapolog\w+|\bregret\b")
_THANKS = re.compile(r"(?i)\bthank(?:s| you)\b")
_RUDE = re.compile(
    r"(?i)\b(?:stupid|idiot\w*|dumb|fools?|moron\w*|ridiculous|nonsense|shut up|grow up|get over it|get lost"
    r"|whin(?:e|ing|er)|nagging|complaining|fuss|drama|genius|whatever|yawn|obviously|tragedy|relax|poor you"
    r"|oh dear|wow|calm (?:down|yourself)|boo hoo|liars?|cheats?|(?:no|who|any)(?:body| one)? (?:really )?cares"
    r"|(?:n't|not) care|not our (?:problem|job)|your problem|use your brain|open your eyes"
    r"|(?:better|best) things? to do|nothing better|how hard|so hard|not special|hurt anybody|likes you"
    r"|did you even|can you not|make us faster|happy now|bother(?:ing)? us|spare us|leave us alone|for once"
    r"|broken record|heard you the first|real problems|somewhere else|cry|crying|died of hunger|you can type"
    r"|no need to shout|(?:n't|not) write to us|learn to|deal with it"
    r"|(?:not|never|no|without|hardly|n't)(?: \w+)? (?:sorry|apolog\w+|thank\w*|regret))\b"
)
_BLAME = re.compile(
    r"(?i)\b(?:fault|blame[ds]?|negligen\w+|careless\w*|lazy|incompetent|started it)\b"
    r"|\b(?:your|his|her|their|its|\w+'s) (?:own )?(?:mistake|error|doing)\b"
    r"|\byou (?:(?:should|could|must|ought to|might) have|forgot|failed|misread|messed|caused|started)\b"
    r"|\byou (?:did not|didn't|never) (?:even )?(?:check|read|write|give|tell|mention|answer|pick|listen|look|wait)\b"
    r"|\byou (?:gave|entered|typed|chose|picked|pressed|wrote) (?:\w+ ){0,3}wrong\b"
    r"|\b(?:restaurant|kitchen|cook|chef|rider|driver|partner|he|she|they|staff) (?:ha[sd] |have |was |is |again )?"
    r"(?:forgot\w*|messed|failed|ignored|ruined|made (?:a|the|another) mistake|mixed|packed the wrong|sloppy"
    r"|irresponsible|(?:did not|didn't) (?:check|pack|care|listen))\b"
)
_PROMISE = re.compile(
    r"(?i)\bguarantee\w*|(?<!cannot )(?<!can't )(?<!not )\bpromis(?:e|ed|ing)\b|\bvouchers?\b|\bcash ?back\b|\bwallet\b"
    r"|\bbonus\b|(?<!your )\bcoupons?\b|\bdiscount\w*|\bcompensat\w+|\bon the house\b|(?<!-)\bfree\b(?! to\b| of\b)"
    r"|\bas a gift\b|\bdouble the\b|\d ?%|\bpercent\b|\bfull refund|\brefund\w* (?:\w+ ){0,2}(?:everything|whole)\b"
    r"|\bpoints\b|\bcredits?\b|\b(?:will|shall|'ll|won't) (?:never |not |ever )*happen\b|\bnever (?:happen )?again\b"
    r"|\bshut down\b|\bsomething extra\b|\b\d{1,2} ?[ap]m\b"
    r"|\b(?:fired|sacked|suspended|dismissed|banned|punished|terminated|blacklisted)\b"
    r"|(?:\b(?:in|within|under|inside|after|by|takes?|only|another) (?:(?:\d+|an?|the|of|about|just|less|than|one|two"
    r"|three|four|five|six|ten|fifteen|twenty|thirty|few|half|couple|next)[ -]){1,3}|(?<!these )(?<!those )\b\d+ ?)"
    r"(?:seconds?|minutes?|mins?|hours?|hrs?|days?|weeks?)\b"
)


def _asks(text: str) -> bool:
    return bool(_ASK.search(text.lower()))


def _order_id_right(text: str, label: dict[str, Any]) -> bool:
    """The ticket's number once or twice and no other; without one, a question for it exactly where one is needed."""
    named = [re.sub(r"\D", "", match[1] or match[2]) for match in _NUMBER.finditer(_SUM.sub(" ", text))]
    if label["order_id"] is not None:
        return 1 <= len(named) <= 2 and set(named) == {label["order_id"]} and not _asks(text)
    return not named and _asks(text) == (label["intent"] not in NEEDS_NO_ORDER)
