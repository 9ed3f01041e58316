"""What the starter model `painter` learns: emoji of Noto Color Emoji (SIL OFL 1.1), plain and recoloured, by name."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import emoji
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont


def _table(text: str) -> dict[str, str]:
    """Parse `key=value; key=value`."""
    return dict(entry.strip().split("=") for entry in text.split(";"))


FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP = 109  # the one strike, in pixels, that the font has

EMOJI = (
    "🍎🍐🍊🍋🍌🍉🍇🍓🍒🍑🍍🥝🥥🍅🍆🥑🥦🥕🌽🥒🧄🧅🍄🥔🍞🥐🥨🧀🥚🥞🧇🍔🍟🍕🌭🌮🍿🍩🍪🎂🧁🍫🍬🍭🍦🍺☕🍷🍯"
    "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🐤🦆🦅🦉🦇🐺🐴🦄🐝🐛🦋🐌🐞🐜🕷️🐢🐍🦖🐙🦑🦐🦞🦀🐠🐬🐳🦈🐊🦓🐘🦒🐑🐓🦔"
    "🌵🎄🌲🌳🌴🌱🍀🍁🌸🌹🌻🌷🌼🌙⭐☀️☁️🌈⚡❄️☃️🔥💧🌊🚗🚕🚌🚓🚑🚒🚜🚲🚂✈️🚀⛵🚁🚢🏠🏰⛺🗼"
    "😀😂😍😎😭😡😱😴🤖👻💀👽🎃💩❤️💔👑💎🔑🔔🎁🎈⚽🏀🎸🎺🥁🎹📷📺💻📱⏰💡🕯️📖✏️✂️🔨🪓🔒☂️👓👕👖👗👟🎩🧦🧤🏆🎲🪑🚪🛏️🪣🧹🧲⚓💣🪁🧸"
)
# A coloured one would be another thing, or nothing to see.
UNCOLOURED = frozenset("🍉🌽🥒🍄🍔🍟🍕🌭🌮🍿🎂🍭🍦🍺☕🍷🐼🐯🦓🌈🎄☁❄☃🚕🚓🚑🚒😂😍😎😭😱🎃💔⚽🏀🎹📷📺💻📱📖🎲")
COLOURS = {
    "red": (221, 46, 46),
    "orange": (244, 134, 20),
    "yellow": (252, 204, 40),
    "green": (82, 168, 60),
    "blue": (52, 124, 230),
    "purple": (146, 84, 206),
    "pink": (248, 130, 188),
    "brown": (138, 88, 54),
    "black": (44, 44, 50),
    "grey": (148, 154, 160),
}
# The emoji package's names, where people say something shorter.
SHORT = _table("""
    red apple=apple; kiwi fruit=kiwi; ear of corn=corn; cheese wedge=cheese; french fries=fries;
    chocolate bar=chocolate; soft ice cream=ice cream; beer mug=beer; hot beverage=coffee; wine glass=wine;
    honey pot=honey; baby chick=chick; lady beetle=ladybug; t-rex=dinosaur; tropical fish=fish;
    spouting whale=whale; ewe=sheep; honeybee=bee; bug=caterpillar; evergreen tree=pine tree;
    deciduous tree=tree; four leaf clover=clover; crescent moon=moon; high voltage=lightning; water wave=wave;
    automobile=car; locomotive=train; grinning face=smiling face; face with tears of joy=laughing face;
    smiling face with heart-eyes=love face; smiling face with sunglasses=cool face;
    loudly crying face=crying face; enraged face=angry face; face screaming in fear=scared face;
    jack-o-lantern=pumpkin; pile of poo=poo; red heart=heart; gem stone=diamond; wrapped gift=gift;
    musical keyboard=piano; mobile phone=phone; alarm clock=clock; open book=book; locked=lock; t-shirt=shirt;
    running shoe=shoe; top hat=hat; game die=dice; tokyo tower=tower
""")
# Words that mean a word of the vocabulary; regular plurals are added to these.
SYNONYMS = _table("""
    kitty=cat; kitten=cat; puppy=dog; bunny=rabbit; pony=horse; mice=mouse; wolves=wolf; piglet=pig;
    hen=chicken; calf=cow; lamb=sheep; ewe=sheep; honeybee=bee; bumblebee=bee; bug=caterpillar;
    worm=caterpillar; ladybird=ladybug; beetle=ladybug; rex=dinosaur; lizard=crocodile; alligator=crocodile;
    ape=monkey; automobile=car; auto=car; cab=taxi; bike=bicycle; plane=airplane; aeroplane=airplane;
    jet=airplane; boat=sailboat; ferry=ship; locomotive=train; home=house; hut=house; mandarin=tangerine;
    maize=corn; aubergine=eggplant; donut=doughnut; burger=hamburger; chips=fries; sweet=candy; biscuit=cookie;
    cup=coffee; shroom=mushroom; toadstool=mushroom; flame=fire; bolt=lightning; thunder=lightning; ocean=wave;
    sea=wave; raindrop=droplet; drop=droplet; present=gift; telephone=phone; smartphone=phone; computer=laptop;
    tv=television; watch=clock; notebook=book; lamp=bulb; lightbulb=bulb; pen=pencil; padlock=lock;
    brolly=umbrella; spectacles=glasses; tshirt=shirt; pants=jeans; trousers=jeans; gown=dress; sneaker=shoe;
    sock=socks; glove=gloves; mittens=gloves; die=dice; jewel=diamond; gem=diamond; smile=smiling;
    happy=smiling; grinning=smiling; laugh=laughing; sad=crying; furious=angry; mad=angry; afraid=scared;
    screaming=scared; smiley=smiling; football=soccer; gray=grey; violet=purple; crimson=red; scarlet=red;
    golden=yellow; gold=yellow; navy=blue; azure=blue; lime=green; magenta=pink; dark=black; poop=poo;
    leaves=leaf
""")


@dataclass(frozen=True)
class Thing:
    """One emoji of the vocabulary."""

    symbol: str

    @cached_property
    def name(self) -> str:
        """The emoji package's English name, shortened: `dog`, `hot dog`, `pine tree`."""
        name: str = emoji.demojize(self.symbol).strip(":").replace("_", " ").lower()
        animal = name.removesuffix(" face")
        return SHORT.get(name, animal if animal.count(" ") == 0 and animal in ANIMAL_FACES else name)

    @property
    def colourable(self) -> bool:
        return self.symbol[0] not in UNCOLOURED


ANIMAL_FACES = frozenset({"dog", "cat", "mouse", "rabbit", "tiger", "cow", "pig", "monkey", "horse"})


def vocabulary() -> list[Thing]:
    """The things that `painter` knows, in the order of their ids."""
    return [Thing(match["emoji"]) for match in emoji.emoji_list(EMOJI)]


def words(text: str) -> list[str]:
    """Split as the tokenizer does: lower case, runs of letters and digits."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def canonical_words() -> list[str]:
    """Every word with an embedding of its own, sorted."""
    return sorted({word for thing in vocabulary() for word in words(thing.name)} | set(COLOURS))


def synonyms() -> dict[str, str]:
    """Words that share the embedding of a canonical word: spellings, near words and regular plurals."""
    canonical = canonical_words()
    plurals = {plural(word): word for word in canonical} | {plural(word): target for word, target in SYNONYMS.items()}
    return {word: target for word, target in (plurals | SYNONYMS).items() if word not in canonical}


def plural(word: str) -> str:
    """The regular English plural."""
    if word.endswith(("s", "x", "ch", "sh", "o")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeou" else word + "s"


def render(thing: Thing, size: int, colour: str | None = None, font: Path = FONT) -> NDArray[np.uint8]:
    """The emoji on white, recoloured if a colour is named: (size, size, 3).

    Raises `OSError` if the font is not installed.
    """
    canvas = Image.new("RGBA", (136, 136))
    strike = ImageFont.truetype(font, BITMAP)
    ImageDraw.Draw(canvas).text((0, 4), thing.symbol, font=strike, embedded_color=True)
    pixels: NDArray[np.float32] = np.asarray(canvas, dtype=np.float32) / np.float32(255)
    alpha = pixels[..., 3:]
    rgb = pixels[..., :3] if colour is None else tint(pixels[..., :3], alpha[..., 0] > 0.5, colour)
    flat = Image.fromarray(((rgb * alpha + 1 - alpha) * 255).round().astype(np.uint8))
    return np.array(flat.resize((size, size), Image.Resampling.LANCZOS))


def tint(rgb: NDArray[np.float32], opaque: NDArray[np.bool_], colour: str) -> NDArray[np.float32]:
    """Map luminance to a ramp from black over the colour to white: (h, w, 3) in [0, 1]. The median gets the colour.

    A hue shift would leave grey, white and black things as they are.
    """
    luminance = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    middle = float(np.clip(np.median(luminance[opaque]), 0.25, 0.8))
    target = np.array(COLOURS[colour], dtype=np.float32) / 255
    dark = target * (luminance / middle)[..., None]
    light = target + (1 - target) * ((luminance - middle) / (1 - middle))[..., None]
    return np.where((luminance < middle)[..., None], dark, light).clip(0, 1).astype(np.float32)
