"""Rules for `ask`: an English question -> one SQLite query, with no model and no learning.

    to_sql("which city had the most late orders?")
    # SELECT city FROM orders WHERE minutes>45 GROUP BY city ORDER BY COUNT(*) DESC LIMIT 1

What an expert writes who knows the table (README.md): closed lists of values, a dozen house words, many ways to say one
thing. The parser

1. puts the question into plain words: lower case, digits for spelled numbers, the nearest known word for a typo,
2. cuts the conditions out, one kind after the other, so that the rest of the question says what is asked for,
3. reads in the rest whether that is a count, a measure, groups, the top groups or single orders.

Any text gives a query. A text in which the rules find nothing gives the count of all orders.
"""

import re
import unicodedata
from functools import lru_cache


def either(text: str) -> str:
    """One pattern from a list of patterns, one or several (with `|` between them) in a line."""
    return "(?:" + "|".join(line.strip() for line in text.strip().splitlines()) + ")"


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


# fmt: off
# --- What the table holds ---------------------------------------------------------------------------------------------

CUSTOMERS = (r"(?: (?:plans?|tier|membership|subscription|accounts?))?"
             r"(?: (?:members?|customers?|users?|subscribers?|people|folks?))?")
STATUS = r"(?:(?:with|have|has|had|a|the) ){0,2}(?:status (?:of |is |was )?)?"
VALUES = {  # column -> value -> how colleagues write it
    "city": {"Pune": "pune", "Delhi": "delhi", "Mumbai": "mumbai|bombay", "Chennai": "chennai|madras",
             "Kochi": "kochi|cochin", "Jaipur": "jaipur"},
    "plan": {plan: plan + CUSTOMERS for plan in ("free", "gold", "office")},
    "cuisine": {food: f"{food}s?" for food in ("thai", "pizza", "biryani", "dosa", "burger", "sushi", "chaat")},
    "status": {status: rf"{STATUS}(?:{words})(?: status)?" for status, words in {
        "done": "done|completed?|finished|went through|(?:successfully|actually) delivered|"
                "delivered(?= (?:orders?|ones|deliver))",
        "cancelled": "cancell?(?:ed|ations?|s)?|called off|scrapped",
        "refunded": "refund(?:ed|s)?|money back"}.items()},
    "payment": {way: rf"{way}(?: (?:payments?|paid|transactions?))?" for way in ("card", "cash", "upi")},
    "month": {str(number): rf"{name[:3]}|{name}|month {number}|{number}th month" for number, name in enumerate(
        ("january", "february", "march", "april", "may", "june"), 1)},
}
GROUPS = {
    "payment": either(r"""(?:payment|paying)(?: (?:methods?|types?|modes?|options?|kinds?))?|payments
                          (?:mode|form|way|method|means)s? (?:of|to) (?:payment|paying|pay)"""),
    "cuisine": r"(?:(?:kinds?|types?|sorts?) of (?:food|dish|cuisine|meal)(?:e?s)?|cuisines?|foods?|dish(?:es)?)",
    "plan": either(r"""plans?|tiers?|memberships?|(?:kinds?|types?|groups?) of (?:customer|member|user)s?
                       (?:customer|member|user) (?:types?|groups?)|(?<=which )(?:customers|members)"""),
    "status": r"(?:status(?:es)?|outcomes?)",
    "city": r"(?:city|cities|towns?|locations?|(?<=which )places?)",
    "month": r"months?",
}
ONE = r"(?:orders?|deliver(?:y|ies)|ones?)"

# --- Plain words ------------------------------------------------------------------------------------------------------

KNOWN = listed("""
average biggest below above better biryani bottom broken burger busiest cancelled card cash cheaper cheapest chennai
chaat cities city completed count cuisine cuisines customer customers delayed delhi delivered deliveries delivery done
during each every exactly expensive fastest february fewest finished five food four free gold highest jaipur june
january april march kinds kochi largest late least longer longest lowest many mean member members method methods
minutes month months most mumbai number office order orders outside paid payment payments people pizza placed plan
plans popular pune quickest quietest rarest rated rating ratings refunded refunds revenue rupees shortest slower
slowest smallest split stars status sushi taking thai three tipped total turnover under unrated untipped value wait
waited which without worst worth dosa best bill
""")
PLAIN = {*KNOWN, *listed("""
also bell beat cars came case cast cart care cost counts country dates does door dose easy east ever fast fees fine
fire foot fold form from full golf gone good have here home hour hours large last later latest lead left less like line
list live lose lost love made make match meal meals means meat much must name near need next nice none note open other
over page pain pair part past pays place places plain plane play post pure rate rates rater ratio road role sale same
seen sent show some sort span stair start stay step such sure take taken team tell than that them then there these they
thing this time times tips took tree trip turn type used user very want week well were west what when while white whole
will with word work year your quick quite quiet price prices those spend spends monthly tipping numbers deliver
delivers parts older ordered ordering customs slowly cheaply few valued values waits share stare star minute totals
plus spilt statue mouth worse quicker smaller shorter larger custom wanted refused rounded meant file crash talking
kids played butter states parents stays kinda bitter completely broke court wasted topped
""")}
ONES = listed("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""")
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
SPELLED = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
SPELLED |= {"hundred": 100, "thousand": 1000}
ONLY_ONE = (r"one(?= (?:stars?|or|and (?:up|above)|hundred|thousand|hour|rs)\b)"  # not the one of "which one"
            r"|(?:(?<=rated )|(?<=least )|(?<=most )|(?<=than )|(?<=over )|(?<=under )|(?<=exactly )"
            r"|(?<=rating of ))one")
SMALL = rf"(?:(?:{'|'.join(TENS)})(?: (?:{'|'.join(ONES[1:10])}))?|{'|'.join(ONES[2:])}|zero|{ONLY_ONE})"
LARGE = rf"(?:(?:(?:{SMALL}|\d+|a) )?(?:hundred|thousand))"
NUMERAL = re.compile(rf"\b(?:{LARGE}(?: (?:and (?={'|'.join(TENS)}))?(?:{LARGE}|{SMALL})(?! stars?))*|{SMALL})\b")

SIGNS = [  # on lower-case text, in this order
    (r"(\d),(?=\d{3}\b)", r"\1"), (r"\b(\d{1,5}(?:\.\d{1,3})?) ?k\b", lambda m: str(int(float(m[1]) * 1000))),
    (r"(\d)\.0+\b", r"\1"), (r"\d{10,}", "999999999"), (r"\b(?:in |of )?2026\b", " "),
    (r"₹|\b(?:rs|inr)\b\.?|\brupees?\b|/-", " rs "),
    (r"[★⭐]+", " stars "), (r"≥|=>|>=", " at least "), (r"≤|=<|<=", " at most "),
    (r"<>|!=", " not "), (r">", " over "), (r"<", " under "), (r"=", " exactly "),
    (r"\bcan(?:not|'t)\b", "can not"), (r"\b(do|did|does|was|were|is|are|have|has|had|could|would)n'?t\b", r"\1 not"),
    (r"'s\b|'(?:re|ve|d|ll|m)\b", " "), (r"(\d) ?\+", r"\1 plus "), (r"\b(\d+)(?:st|nd|rd|th)\b", r"\1th"),
    (r"(\d)(?=[a-su-z])", r"\1 "), (r"[^a-z0-9,:;.?!]", " "), (r"([,:;.?!])", r" \1 "),
]
ALONE = rf"\b(?! (?:\w+ ){{0,4}}{ONE}\b)"  # "which order was most tipped", but not "the most tipped orders"
PHRASES = [  # on plain words: one way to say it for many
    (r"\ban? hours? and a half\b", "90 minutes"), (r"\b(?:3 )?quarters? of an hour\b", "45 minutes"),
    (r"\bhalf (?:an? )?hour\b", "30 minutes"), (r"\ban? hour\b", "60 minutes"),
    (r"\b(\d{1,4}) hours?\b", lambda m: f"{60 * int(m[1])} minutes"), (r"\bperfect (\d)\b", r"\1 stars"),
    (r"\bmins?\b|\bminute\b", "minutes"), (r"\bavg\b", "average"), (r"\ba couple(?: of)?\b", "2"),
    (r"\b(?:a )?dozen\b", "12"), (r"\bon the dot\b", "exactly"),
    (r"\b(?:may|might) (?=(?:i|we|you|be|have|not)\b)|(?<=\bi )may\b", " "), (rf"\b({ONE}|those) where\b", r"\1 that"),
    (r"\bi mean (?:by|per|for each|which) ", "which "), (r"\border (?:numbers?|ids?)(?! by\b)", "ids"),
    (r"\bi mean\b|\bfirst of all\b|\bat all\b|\b(?:a |real )?quick(?:ly)? (?:question|check|one|note|please|thanks)\b"
     r"|(?<=, )quickly(?= [.?!]|$)|\bfor (?:the|a) (?:\w+ )?(?:report|meeting|slide|deck|review)\b", " "),
    (r"\bhow (?:do|did|does) ((?:\w+ ){1,4})pay\b(?! on average)", r"which payment \1"),
    (r"\blongest (?:running|lasting)\b", "slowest"),
    (r"\b(?:any|some)(?:one|body) (?:has |ever |in \w+ )*(tip|wait|spen|pa[iy])(?:t|ped|ed|d|s)?\b",
     lambda m: m[1] if m[1] in ("tip", "wait") else "total"),
    (r"\b(?:best|highest|top|better) rated\b|\brated (?:the )?(?:best|highest|most highly)\b", "highest scored"),
    (r"\b(?:worst|lowest|poorest|badly) rated\b|\brated (?:the )?(?:worst|lowest)\b", "lowest scored"),
    (rf"\bmost tipped{ALONE}|\btipped (?:the )?(?:most|best|highest)\b(?! {ONE})|\b(?:best|highest|top) tipped\b"
     r"|\b(?:most )?generous(?:ly)?(?: (?:tipp\w+|with (?:their )?tips?))?\b", "highest tipping"),
    (rf"\bleast tipped{ALONE}|\btipped (?:the )?(?:least|worst|lowest)\b(?! {ONE})|\b(?:worst|lowest) tipped\b",
     "lowest tipping"),
    (r"\b(?:in|from|for) (?:months|cities|cuisines|plans|payments) (?=(?:other than|except|outside|not)\b)", ""),
    (r"\bmonthly\b|\bmonth by month\b", "per month"),
    (r"\b(city|month|cuisine|plan|payment|status) ?wise\b", r"per \1"),
]
# fmt: on


def _slips(word: str, known: str) -> int:
    """How many letters were dropped, added, exchanged or swapped with their neighbour (optimal string alignment)."""
    before, row = [], list(range(len(known) + 1))
    for i, a in enumerate(word, 1):
        above, before, row = before, row, [i]
        for j, b in enumerate(known, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == known[j - 2] and b == word[i - 2]:
                row[j] = min(row[j], above[j - 2] + 1)
    return row[-1]


@lru_cache(maxsize=10_000)
def spelled(word: str) -> str:
    """The known word with the same first letter that is one slip away (two if it is long), else the word itself."""
    if not 4 <= len(word) <= 14 or word in PLAIN or word in SPELLED or not word.isalpha():
        return word
    near = [(_slips(word, known), -len(known), known) for known in KNOWN
            if known[0] == word[0] and abs(len(known) - len(word)) < 3]  # fmt: skip
    slips, _, known = min(near, default=(9, 0, word))
    return known if slips <= (2 if len(known) >= 8 else 1) else word


def _digits(match: re.Match) -> str:
    """`five hundred` -> 500, `twenty five` -> 25."""
    whole, part = 0, 0
    for word in match[0].split():
        value = int(word) if word.isdigit() else SPELLED.get(word, 0)
        if value == 1000:
            whole, part = whole + max(part, 1) * 1000, 0
        else:
            part = max(part, 1) * 100 if word == "hundred" else part + value
    return str(whole + part)


def normalize(question: str) -> str:
    """The question in lower case, with digits, without slips, one blank between words and marks."""
    text = unicodedata.normalize("NFKC", question[:1000]).lower().replace("’", "'")
    for pattern, to in SIGNS:
        text = re.sub(pattern, to, text)
    text = NUMERAL.sub(_digits, " ".join(map(spelled, text.split())))
    for pattern, to in PHRASES:
        text = re.sub(pattern, to, text)
    return " ".join(text.split())


# fmt: off
# --- Conditions -------------------------------------------------------------------------------------------------------

LINK = either("""a|an|the|our|on|in|into|from|by|with|for|to|of|at|as|via|using|through|any|all|is|it|they|you|we
    either|one|ones|be|been|being|are|were|was|have|has|had|get|got|gets|go|went|come|came|arrive|paid|pay|placed|place|made|make|delivered
    ordered|order|orders|use|used|marked|status|end|ended|up|contain|include|including|counting|actually|really|yet|ever
    city|cuisine|plan|payment|month|took|taking|take|cost|costing|rated|rate|give|given|leave|left|worth""")
NOT = either("""not|never|non|no|neither|nor|outside|other than|except(?:ing)?(?: for)?|excluding|exclude|apart from
    besides|aside from|(?:anything|anywhere|everything|everywhere|all) but|without|rather than|ignoring|leaving out""")
NO = either(r"""(?:no|without|zero|lacking|lacks?|missing|0)(?: (?:a|an|any))?|never (?:got|left|received|had) (?:a|any)
    nobody \w+ (?:a|any)
    not (?:(?:get|got|have|had|leave|left|receive|give|been|given|with|come|came|carry) ){0,3}(?:a|any)
    no (?:one|1) \w+ (?:a|any)""")
OF = r"(?! (?:of|over|under|above|below|at|exactly|better|worse|more|less|\d))"  # a number follows
NOBODY = r"(?:nobody|no one|no 1|none|no customer)(?: (?:has|have|had|ever|bothered to|cared to))*"
NEVER = r"(?:not|never|without)(?: (?:been|yet|be|being|get|got|were|ever|actually|even|bother to))*"
HOUSE = [  # pattern, condition, its opposite; what stands further up is cut out first
    (either(rf"""unrated|unreviewed|{NO} (?:ratings?|stars?|reviews?|feedback|scores?)\b{OF}
        {NEVER} (?:rated?|reviewed)\b(?! (?:\w+ ){{0,2}}\d)
        {NOBODY} (?:rated?|reviewed?)|yet to be rated
        (?:rating|stars) (?:(?:is|are|was|were) )?(?:missing|empty|null|blank)"""),
     "stars IS NULL", "stars IS NOT NULL"),
    (either(rf"""untipped|tip(?:less| free)|{NO} tips?\b{OF}|tip (?:of|was|is) (?:0|nothing)|stiffed
        {NEVER} tip(?:ped|ping)?\b(?! (?:\w+ ){{0,2}}\d)
        {NOBODY} tip(?:ped)?|(?:left|tipped|gave) (?:\w+ )?nothing"""), "tip=0", "tip>0"),
    (r"(?:late|delayed|overdue|behind schedule)\b(?! than)", "minutes>45", "minutes<=45"),
    (r"(?:on time|in time|punctual(?:ly)?)\b", "minutes<=45", "minutes>45"),
    (r"(?<!how )big\b(?! (?:tips?|tippers?)\b)", "total>=1000", "total<1000"),
]
HOUSE_LATER = [  # after the numbers, since "tipped more than 70" and "rated 4" are no house words
    (r"(?:tipped|(?<!of )(?:a|some) tips?|with tips?|(?:who|that|did) (?:did )?tip\b(?! (?:most|least|on|in|alto)))",
     "tip>0", "tip=0"),
    (either(r"""rated(?= (?:_\d|orders|deliver|order|ones|[,:]))|(?:a|some|any) (?:rating|review|score)
        (?:some|any) stars|(?:were|was|been|got|are|is|get|people|somebody|someone|customers|actually) rated"""),
     "stars IS NOT NULL", "stars IS NULL"),
]
MORE = "more|above|better|higher|over|longer|up|greater|bigger|upwards?|slower|beyond"
LESS = "less|lower|fewer|below|under|worse|shorter|faster|cheaper|quicker|down|smaller"
BEFORE = {  # what stands before a number
    ">=": rf"at least|not? (?:{LESS})(?: than)?|(?:a )?min(?:imum)?(?: of)?|starting (?:at|from)|upwards? of",
    "<=": rf"at most|not? (?:{MORE})(?: than)?|up to|(?:a )?max(?:imum)?(?: of)?|within|not? exceeding",
    ">": either("""(?:more|greater|higher|larger|bigger|longer|slower|better|pricier|expensive) than
        over|above|beyond|past|exceed(?:s|ed|ing)?|in excess of|north of"""),
    "<": "(?:less|fewer|lower|smaller|cheaper|faster|quicker|shorter|worse|sooner) than|under|below|beneath|short of",
    "=": "exactly|precisely|equal to|equals",
}
AFTER = {  # what stands after it
    ">=": rf"(?:or|and) (?:{MORE})\b(?! (?:than|rs|\d))|plus|upwards?|at least|(?:at )?minimum|onwards?",
    "<=": rf"(?:or|and) (?:{LESS})\b(?! (?:than|rs|\d))|at most|(?:at )?max(?:imum)?|tops",
    "=": "exactly|flat|sharp",
}
FLIP = {">": "<=", "<": ">=", ">=": "<", "<=": ">", "=": "<>"}
UNIT = "rs|minutes|stars?|tips?"
NUMBER = re.compile(
    rf"(?:\b(?P<neg>not|never)(?: {LINK}){{0,4}}? )?"
    rf"(?:\b(?P<pre>{'|'.join(f'(?P<pre{i}>{p})' for i, p in enumerate(BEFORE.values()))})(?: (?:a|of|the))? )?"
    rf"(?P<rs>rs )?\b(?P<n>\d+)\b(?: (?P<unit>{UNIT})\b)?"
    rf"(?: (?:{'|'.join(f'(?P<post{i}>{p})' for i, p in enumerate(AFTER.values()))})\b)?"
    rf"(?: (?:of |in |as |for )?(?:a |the )?(?P<unit2>{UNIT})\b)?")
NOUNS = {  # words before a number -> the column that they speak of; None: what was said before does not count any more
    "tip": "tips?|tipped|tipping", "stars": "rated|ratings?|stars|scored?|reviews?",
    "minutes": "took|take|taking|minutes|time|waited|waiting|wait|delivered|arrived|slower|faster|quicker|longer",
    "total": "total|costs?|costing|worth|bill|values?|valued|spent|priced?|cheaper|pricier|expensive|amount|paid",
    None: r"_\d+|orders?|deliver(?:y(?! time)|ies)|ones|and|that|which|,|:|;|by|name|top|bottom",
}
NOUN_AT_END = re.compile(
    rf"\b(?:(?:with|got|get|left|had|have|a|the|their|of|was|were|that|which) )*"
    rf"(?P<noun>{'|'.join(words for column, words in NOUNS.items() if column)})"
    r"(?: (?:of|is|was|were|at|a|as|it|only))*$")
# fmt: on


class Reader:
    """The question while it is read: where the condition `found[3]` was cut out, `text` has the word _3."""

    def __init__(self, text: str):
        self.text, self.found = text, []

    def cut(self, start: int, end: int, condition: str | None) -> None:
        """Put a mark in the place of these characters."""
        self.text = f"{self.text[:start]}_{len(self.found)}{self.text[end:]}"
        self.found.append(condition)

    def take(self, pattern: str, condition: str, opposite: str) -> None:
        """Cut out each place that the pattern fits, with a `not` or the like before it."""
        while match := re.search(rf"\b(?:(?P<neg>{NOT})(?: {LINK}){{0,5}} )?(?:{pattern})(?!\w)", self.text):
            self.cut(*match.span(), opposite if match["neg"] else condition)

    def values(self) -> None:
        """Cities, plans, cuisines, statuses, ways to pay and months."""
        for column, values in VALUES.items():
            for value, words in values.items():
                if column == "month":
                    for op, cue in ((">=", "since"), (">", "after"), ("<", "before"), ("<=", "until|till|up to")):
                        self.take(rf"(?:{cue}) (?:{words})", f"month{op}{value}", f"month{FLIP[op]}{value}")
                shown = value if column == "month" else f"'{value}'"
                self.take(words, f"{column}={shown}", f"{column}<>{shown}")

    def column(self, start: int, unit: str | None, number: int) -> str:
        """The column that a number belongs to: by its unit, else by the nearest noun before it, else by its size."""
        if unit and unit != "rs":
            return {"m": "minutes", "t": "tip", "s": "stars"}[unit[0]]
        places = [(match.end(), column) for column, words in NOUNS.items()
                  for match in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", self.text[:start])]  # fmt: skip
        near = max(places, key=lambda place: place[0], default=(0, None))[1]
        if unit == "rs":
            return "tip" if near == "tip" else "total"
        return near or ("stars" if number <= 5 else "minutes" if number < 100 else "total")

    def numbers(self) -> None:
        """Comparisons, and numbers that stand for a value. A number with no sign of either stays: it is a k."""
        pair = rf"\bbetween (?:rs )?(\d+) (?:rs |minutes )?and (?:rs )?(\d+)(?: ({UNIT})\b)?"
        while match := re.search(pair, self.text):
            column = self.column(match.start(), match[3], int(match[2]))
            self.cut(*match.span(), f"{column}>={match[1]} AND {column}<={match[2]}")
        at = 0
        while match := NUMBER.search(self.text, at):
            at, size = match.end(), len(self.text)
            op = next((op for i, op in enumerate(BEFORE) if match[f"pre{i}"]), None)
            op = next((op for i, op in enumerate(AFTER) if match[f"post{i}"]), op)
            units = [unit for unit in (match["unit"], match["unit2"], match["rs"] and "rs") if unit]
            unit = next((unit for unit in units if unit != "rs"), "rs" if units else None)
            start = match.start() if match["neg"] or op else match.start("rs") if match["rs"] else match.start("n")
            noun = NOUN_AT_END.search(self.text[:start].rstrip())
            if not (op or unit or (noun and not re.search(NOUNS["minutes"], noun["noun"]))):
                continue
            compared = match["pre"] and re.search("er than|expensive", match["pre"])  # "cheaper than" names its column
            end = match.start("n") if compared or not match["pre"] else match.start("pre")
            column = self.column(end, unit, int(match["n"]))
            self.cut(start, match.end(), f"{column}{FLIP[op or '='] if match['neg'] else op or '='}{match['n']}")
            if noun and re.search(rf"\b(?:{NOUNS[column]})\b", noun["noun"]):
                self.cut(noun.start(), start - 1, None)
            at += len(self.text) - size

    def conditions(self) -> list[str]:
        """All conditions of the question, in its order."""
        for house in HOUSE[:2]:
            self.take(*house)
        self.values()
        for house in HOUSE[2:]:
            self.take(*house)
        self.numbers()
        for house in HOUSE_LATER:
            self.take(*house)
        found = [self.found[int(mark)] for mark in re.findall(r"\b_(\d+)\b", self.text)]
        return list(dict.fromkeys(filter(None, found)))

    def rest(self) -> str:
        """The question without its conditions."""
        return " ".join(re.sub(r"\b_\d+\b", " ", self.text).split())


# fmt: off
# --- What is asked for ------------------------------------------------------------------------------------------------

MEASURES = {  # words in the rest of the question -> column
    "tip": r"\btip\w*\b",
    "stars": r"\b(?:stars?|rat(?:es?|ed|ings?)|reviews?|score[sd]?|satisfied|happiest)\b",
    "minutes": r"\b(?:minutes|times?|slow\w*|fast\w*|quick\w*|wait\w*|long|longer|longest|shortest|speed|duration)\b",
    "total": r"\b(?:totals?|values?|bills?|cost\w*|spend\w*|spent|expensive|cheap\w*|pric\w*|worth|amount\w*|rs"
             r"|comes? to|sum|money|how big|average orders?|pays?(?! (?:by|with|in|using|via|through)))\b",
}
COUNT = r"\b" + either(r"""how many(?! (?:minutes|stars|rs)\b)|how (?:often|frequently)|number of (?!minutes|stars)
    what number|counts?|counted|popular\w*|common|rare\w*|ordered|busiest|quietest|favou?rite""") + r"\b"
REVENUE = r"\b" + either(r"""revenues?|turnovers?|turn(?:ed)? over
    how much (?:money )?(?:did|do|have) (?:we|you|it|that|they) (?:\w+ )?(?:ma[dk]e|earn(?:ed)?|sell|sold)""") + r"\b"
SUMMED = r"\b" + either(r"""sum|altogether|in total|in all|add(?:s|ed)? up|together|combined|collect(?:ed)?|total tips?
    tip total|total (?:order |delivery )?(?:value|time|minutes|amount|bill)""") + r"\b"
AVERAGE = r"\b(?:average|mean|usual(?:ly)?|typical(?:ly)?|normal(?:ly)?|per order|generally)\b"
UP = r"\b" + either(r"""most|highest|biggest|largest|longest|slowest|priciest|greatest|max(?:imum)?|dearest|busiest
    favou?rite|heaviest|happiest|strongest|leads?|peak\w*|prefer\w*|mostly|mainly""") + r"\b"
DOWN = r"\b" + either("""least|fewest|lowest|smallest|shortest|fastest|quickest|cheapest|min(?:imum)?|rarest|quietest
    poorest|weakest""") + r"\b"
WEAK_UP, WEAK_DOWN = r"\b(?:top|best|comes? first|first)\b", r"\b(?:bottom|worst|comes? last|last)\b"
SORTED_DOWN = r"\b(?:(?:smallest|lowest|least|shortest|fastest|cheapest) first|ascending)\b"
BAD = {"minutes>45", "status='cancelled'", "status='refunded'", "stars IS NULL", "tip=0"}  # the worst has most of them
EACH = (r"\b(?:per|by|for each(?: of)?|each|for every|every|across|over|among|between|against|compare|for all)"
        r"(?: (?:the|our|all|different|of|single))* ")
FOOD = r"\bwhat (?:food )?" + either(r"""(?:do|does|did)\b.*\b(?:order|eat|buy)\b(?! value)
    (?:gets?|is|was|are|sells|sold)(?: being)? (?:ordered|eaten|sold|bought|best|most|least|worst)""") + r"\b"
A_NUMBER = either(r"""\bhow (?:long|much|expensive|cheap|big|fast|quick|slow|many|good|bad|large|small|high)(?:ly)?\b
    \bin (?:minutes|rs)\b|\bour (?:fastest|quickest) delivery\b|\blongest delivery\b
    (?:^|[:,] )(?:fastest|quickest|slowest) delivery\b
    \b(?:longest|shortest|most|least|fastest|slowest) (?:that )?(?:we|you|they|people|customers|wait)\b
    \b(?:fastest|quickest|slowest) delivery (?:of|for) (?:\w+ )?(?:orders|deliveries|ones)\b""")
SUPERLATIVE = f"(?:{UP}|{DOWN}|{WEAK_UP}|{WEAK_DOWN})"
AN_ORDER = either(rf"""\bids?\b|\bsort\b|\bwhich (?:\w+ )?(?:of )?(?:the |our )?(?:\w+ )?{ONE}\b
    \b{ONE} (?:\w+ ){{0,3}}?with (?:the )?{SUPERLATIVE}""")
VALUE = rf"{SUPERLATIVE} (?:\w+ )?(?:tips?|total|bill|value|rating|minutes|wait|time|amount)\b"
# fmt: on


def measured(rest: str) -> str | None:
    """The column whose number is asked for; None: orders are counted."""
    if re.search(COUNT, rest) and not re.search(AVERAGE, rest):
        return None
    summed = "total" if re.search(SUMMED, rest) and not re.search(COUNT, rest) else None
    return next((column for column, words in MEASURES.items() if re.search(words, rest)), summed)


def direction(rest: str, column: str | None) -> str | None:
    """`DESC`, an empty string (ascending) or None if nothing is compared. Best and worst depend on the column."""
    if re.search(SORTED_DOWN, rest):
        return ""
    for more, less in ((UP, DOWN), (WEAK_UP, WEAK_DOWN)):
        up, down = re.search(more, rest), re.search(less, rest)
        if up or down:
            first_is_up = up is not None and (down is None or up.start() < down.start())
            turned = more == WEAK_UP and column == "minutes" and re.search(r"\b(?:best|worst)\b", rest)
            return "DESC" if first_is_up != bool(turned) else ""
    return None


def grouped(rest: str) -> tuple[str | None, bool]:
    """The column to group by, and whether the question wants a number for each of its values."""
    for column, words in GROUPS.items():
        if re.search(rf"{EACH}{words}\b|\b{words} (?:and|with|plus) (?:their|its|the (?:average|mean|number))\b", rest):
            return column, True
    places = [(m.start(), column) for column, words in GROUPS.items() for m in re.finditer(rf"\b{words}\b", rest)]
    compared = direction(rest, None) is not None
    listing = r"\d|\b(?:which|what|split|spread|break\w*|list|compare|show)\b"
    if places and (compared or min(places)[0] == 0 or re.search(listing, rest)):
        return min(places)[1], False
    words = {r"\bwhere\b": "city"}
    if compared:
        words |= {r"\bwhen\b": "month", FOOD: "cuisine", r"\bwho\b(?! (?:rated|tipped|paid|pay))": "plan"}
    return next((column for pattern, column in words.items() if re.search(pattern, rest)), None), False


def aggregate(rest: str, column: str | None, grouping: bool) -> str:
    """SQL of the number that is asked for, or by which groups are ranked."""
    if column is None:
        return "COUNT(*)"
    if re.search(AVERAGE, rest):
        return f"AVG({column})"
    much = r"\bhow much (?:tips?|money)\b|\b(?:most|least|fewest) (?:in )?(?:tips|money)\b"
    if re.search(SUMMED, rest) or (column in ("tip", "total") and re.search(much, rest)):
        return f"SUM({column})"
    if grouping:
        return f"MAX({column})" if re.search(r"\bsingle (?:order|delivery|tip)\b", rest) else f"AVG({column})"
    if (column == "tip" and re.search(r"\btips\b", rest)) or (
        column == "total" and re.search(r"\bhow much (?:did|have|has|do) (?!an?\b|the\b|orders|deliveries)", rest)
    ):
        return f"SUM({column})"
    turn = direction(rest, None)
    return f"AVG({column})" if turn is None else f"MAX({column})" if turn else f"MIN({column})"


def to_sql(question: str) -> str:
    """One SQLite query for the question; any text gives some query that runs."""
    reader = Reader(normalize(question))
    conditions, rest = reader.conditions(), reader.rest()
    revenue = re.search(REVENUE, rest) is not None
    if revenue:
        conditions = list(dict.fromkeys(["status='done'", *conditions]))
    where = " FROM orders" + (" WHERE " + " AND ".join(conditions) if conditions else "")
    column = "total" if revenue else measured(rest)
    turn = direction(rest, column)
    group, each = grouped(rest)
    number = re.search(r"\b[1-9]\d*\b", rest)
    k = number[0] if number else "1"
    ranking = group and (number or (turn is not None and not each))
    if revenue:
        term = "AVG(total)" if re.search(r"\b(?:average|mean)\b", rest) else "SUM(total)"
    else:
        term = aggregate(rest, column, bool(ranking))
    if ranking:
        if term == "COUNT(*)" and BAD & set(conditions) and (word := re.search(r"\b(?:best|worst)\b", rest)):
            turn = "DESC" if word[0] == "worst" else ""
        order = f"{term} {'DESC' if turn is None else turn}".strip()
        return f"SELECT {group}{where} GROUP BY {group} ORDER BY {order} LIMIT {k}"
    if group:
        return f"SELECT {group}, {term}{where} GROUP BY {group}"
    asks_number = any(re.search(words, rest) for words in (A_NUMBER, VALUE, SUMMED, COUNT))
    asks_orders = number or re.search(AN_ORDER, rest) or not asks_number
    if asks_orders and turn is not None and not revenue and not re.search(AVERAGE, rest):
        return f"SELECT id{where} ORDER BY {column or 'total'} {turn}".strip() + f" LIMIT {k}"
    return f"SELECT {term}{where}"
