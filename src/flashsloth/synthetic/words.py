"""Words to show: everyday short ones, made-up ones, and those kept for the test split."""

import random

from .language import LANGUAGE

_COMMON = """
able acid also arch area army atom aunt away baby back badge bake ball band bank bark barn base bath beach beam bean
bear beat bed beef bell belt bench berry bite block blow board boat body bold bolt bone book boot boss bowl box brain
brass brick bride brief broom brush bud bug bulb bush busy cabin cable cage calm camp cane cape card cargo cart case
cash cave chain chair chalk chef chess chest chin city clam class clay clean clerk cliff clock cloth cloud club coach
coal coast coat coin cold comb cook cool copy coral core cork couch crab craft crane cream crew crib crop crowd crown
cube cup curb curl dance dark date dawn deal deep den desk dial dice dirt dish dive dock doll door dove draft draw
dream dress drill drive drum duck dune dusk dust eagle early earth east easy edge elbow empty enter equal exit fable
face fact fair fame farm fast fawn feast fence fern field film fire firm flag flame flat fleet flint flood floor flour
flute foam fog foil fold food foot form fort frame fresh front frost fruit fuel full fun gain game gap garden gas gate
gear ghost giant gift girl glad glass globe glove glue goal goat gold golf good goose grain grape grass grid grip
group guard guest guide gum hair hall hammer hand harbor hard harp hat hawk hay head heart heat help herb hero hill
hint hive hold hole home hood hook hope horn hotel hour house hunt hut ice idea inch ink iron island ivy jacket jade
jar jazz jeans jelly jewel job join joke jump junior keen keep kettle king kite knee knife knot label lace lake lamb
lane laser late lava lawn leaf lean lens level lid lift light lime link lion list live load loaf lobby local lock log
long loop love luck lunch mail main maple march mask mast mat maze meal metal mild mile mill mind mine mint mist mix
model moon moss moth motor mouse mouth move mud music nail navy neck nest net night noon north nose note novel nurse
nut oak oar oasis ocean offer olive open orbit order oval oven pack paint pair palm pan panel park part party pasta
path pause peace peach pear pebble pedal pen pepper pet piano pick pier pilot pin pine pipe plan plate play plum poem
pole pond pony pool port post pot pouch print prize pump pupil quail queen quick quiet quilt quiz race radar radio
rail rain ramp ranch rank raven ready reef rest rich ride ridge ring ripe river road roast robe robin rock roof room
root rope rose round route royal rug ruler run rush saddle safe sail salad salon sand sauce scale scarf scene school
scout screen sea seal seat seed sense shade shark shed sheep shelf shell shift shine shore shut silk silver sink skate
ski skin sky sled sleep slide slow smile smoke snail snow soap sock soda sofa soft soil solar song south space spice
spin spoon sport spot stage stair stamp start state steam steel stem step stick still stone stop store storm stove
straw street suit surf swan sweet swim tail tale talk tank team tent test thick thin tide tiger tile time tin tip tire
today toe tone tool tooth torch tour tower town toy track trade trail train tray tree trip trout tub tulip tuna tune
tunnel turn twin uncle under union upper urban valley vase vest video view villa vine vocal voice vote wagon wait walk
wall warm wash watch water wave wax way week well west whale wheat wheel wide wild wind wine wing winter wise wolf
wood wool work world yard yarn year young zebra zone
"""
_KEPT_FOR_TEST = """
apple angel arrow bagel basil beaver bridge button cactus camel canal canvas carbon carrot castle cedar cherry cider
circus clover cobra comet copper cotton cradle daisy deck dragon echo ember engine falcon fiddle forest fossil galaxy
ginger hazel helmet hockey igloo indigo jaguar jungle karma kayak kiwi ladder lemon lilac lotus magnet mango meadow
mirror monkey needle nickel oyster oxygen panda parrot pencil pirate planet pocket poppy prism puzzle rabbit radish
rocket salmon scroll shrimp sketch spider sugar sunset temple ticket tomato turtle velvet violet walnut window yogurt
"""
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 6

HELD_OUT_WORDS: tuple[str, ...] = tuple(_KEPT_FOR_TEST.split())

# short names of chart categories
LABEL_SETS: tuple[tuple[str, ...], ...] = (
    ("mon", "tue", "wed", "thu", "fri", "sat", "sun"),
    ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    ("cat", "dog", "cow", "hen", "pig", "fox", "bee", "owl"),
    ("car", "bus", "van", "tram", "bike", "ship", "taxi", "jet"),
    ("ann", "bob", "eve", "tom", "kim", "max", "sue", "ray"),
    ("q1", "q2", "q3", "q4", "q5"),
)

TRAIN_TITLES: tuple[str, ...] = (
    "sales", "speed", "rain", "votes", "score", "users", "goals", "fuel", "heat", "visits", "steps", "calls", "stock",
    "snow", "books", "trips", "wins", "tests", "bikes", "trees", "taxes", "rent", "wages", "sleep", "food", "power",
    "water", "cars", "crops", "births", "noise", "games", "mail", "trade", "wind", "tides", "miles", "loans", "gold",
)  # fmt: skip
HELD_OUT_TITLES: tuple[str, ...] = (
    "profit", "height", "weight", "budget", "prices", "growth", "demand", "output", "clicks", "oil", "exams", "pets",
    "jobs", "debts", "hours",
)  # fmt: skip

TRAIN_ITEMS: tuple[str, ...] = (
    "tea", "egg", "milk", "rice", "soup", "cake", "bread", "fish", "corn", "jam", "nuts", "salt", "ham", "beans",
    "water", "juice", "pasta", "salad", "pizza", "cheese", "butter", "grapes", "pear", "plum", "lime", "wine", "beer",
    "soda", "tofu", "soap", "pen", "book", "cup", "hat", "sock", "lamp", "brush", "glue", "map",
)  # fmt: skip
HELD_OUT_ITEMS: tuple[str, ...] = (
    "coffee", "bacon", "honey", "melon", "onion", "steak", "candy", "cocoa", "toast", "tape", "fork", "mug", "leek",
    "oats",
)  # fmt: skip

HELD_OUT: frozenset[str] = frozenset(HELD_OUT_WORDS) | frozenset(HELD_OUT_TITLES) | frozenset(HELD_OUT_ITEMS)
TRAIN_WORDS: tuple[str, ...] = tuple(word for word in _COMMON.split() if word not in HELD_OUT)


def random_string(rng: random.Random, shortest: int = 3, longest: int = LONGEST) -> str:
    """A pronounceable made-up word, or plain random letters; never one of the held-out words."""
    while True:
        length = min(longest, max(shortest, rng.choices((3, 4, 5, 6), (5, 7, 5, 3))[0]))
        if rng.random() < 0.6:
            start = rng.randrange(2)
            text = "".join(rng.choice(_CONSONANTS if (place + start) % 2 else _VOWELS) for place in range(length))
        else:
            text = "".join(rng.choice(_LETTERS) for _ in range(length))
        if text not in HELD_OUT and text not in LANGUAGE:
            return text


def random_number(rng: random.Random) -> str:
    """Two to four digits without a leading zero."""
    return str(rng.randint(10, 10 ** rng.randint(2, 4) - 1))


def choose_words(rng: random.Random, count: int, held_out: bool, made_up: float = 0.45) -> list[str]:
    """Different words: of the list or, with probability `made_up`, random; with `held_out` one of them is held out."""
    words: dict[str, None] = {}
    if held_out:
        words[rng.choice(HELD_OUT_WORDS)] = None
    while len(words) < count:
        words[random_string(rng) if rng.random() < made_up else rng.choice(TRAIN_WORDS)] = None
    chosen = list(words)
    rng.shuffle(chosen)
    return chosen


def choose_title(rng: random.Random, held_out: bool) -> str:
    """A chart title."""
    if held_out:
        return rng.choice(HELD_OUT_TITLES)
    return rng.choice(TRAIN_TITLES) if rng.random() < 0.5 else choose_words(rng, 1, False)[0]
