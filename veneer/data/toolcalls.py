"""The demo's data set: a free-text request and the exact JSON call that answers it.

Sentence templates are held out: the test split uses `asked` templates that training never shows, and values (names,
places, amounts, words to copy) of its own where that is natural. Every argument is a copy from the text or a light
normalisation of it (7 am -> 7:00 am, dollars -> USD), so that right or wrong is a comparison of strings.

To edit: a function is an entry of FUNCTIONS; a template's {fields} are its arguments, in the order of the signature
in the call; a kind of argument is an entry of VALUES: for each split a list of what is said, or (said, meant).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError

Split = Literal["train", "test"]
Value = tuple[str, str | int]  # as it is said in the request, as it stands in the call

OPENING = "Call a function: "
PATIENCE = 10_000  # draws in a row without a new prompt before the templates count as used up


@dataclass(frozen=True)
class Function:
    """One function to call: argument names with the kinds of their values, and the sentences that ask for it."""

    name: str
    arguments: dict[str, str]
    train: tuple[str, ...]
    test: tuple[str, ...]


def rows(split: Split, n: int, seed: int) -> list[dict[str, str]]:
    """`n` distinct rows with `prompt` and `completion`, the functions in turn; a pure function of its arguments.

    Raises DataError where the split has no templates or fewer than `n` different rows.
    """
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}, wanted 'train' or 'test'")
    rng = random.Random(f"toolcalls/{split}/{seed}")
    found: dict[str, str] = {}
    draws = last = 0
    while len(found) < n:
        prompt, completion = _row(FUNCTIONS[draws % len(FUNCTIONS)], split, rng)
        draws += 1
        if prompt not in found:
            found[prompt] = completion
            last = draws
        elif draws - last > PATIENCE:
            raise DataError(f"{n:,} {split} rows are wanted, the templates make about {len(found):,} different ones")
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def write(folder: str | Path, n_train: int = 1600, n_test: int = 200, seed: int = 0) -> dict[str, Path]:
    """Writes `train.jsonl` and `test.jsonl` into `folder`, made if missing; returns their paths by split."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = {}
    sizes: dict[Split, int] = {"train": n_train, "test": n_test}
    for split, size in sizes.items():
        files[split] = Path(folder) / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, size, seed)]
        files[split].write_text("".join(lines), encoding="utf-8", newline="\n")
    return {str(split): file for split, file in files.items()}


def call(name: str, arguments: dict[str, Any]) -> str:
    """The canonical form of a call: compact JSON, arguments in the order of the signature."""
    return json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"), ensure_ascii=False)


def _row(function: Function, split: Split, rng: random.Random) -> tuple[str, str]:
    values = _values(function, split, rng)
    template = _pick(function.train if split == "train" else function.test, rng)
    request = template.format(**{name: said for name, (said, _) in values.items()})
    return OPENING + request, call(function.name, {name: meant for name, (_, meant) in values.items()})


def _values(function: Function, split: Split, rng: random.Random) -> dict[str, Value]:
    """A value for each argument; two arguments of one kind differ (nobody converts euros to euros)."""
    chosen: dict[str, Value] = {}
    for name, kind in function.arguments.items():
        taken = [meant for other, (_, meant) in chosen.items() if function.arguments[other] == kind]
        chosen[name] = _pick([value for value in VALUES[kind][split] if value[1] not in taken], rng)
    return chosen


def _pick(items: Sequence[Any], rng: random.Random) -> Any:
    """An item by `random()`, the one draw whose sequence Python keeps the same in every version."""
    return items[int(rng.random() * len(items))]


FUNCTIONS: tuple[Function, ...] = (
    Function(
        "set_alarm",
        {"time": "time"},
        train=(
            "wake me up at {time}",
            "set an alarm for {time}",
            "alarm at {time} please",
            "I need to get up at {time}",
            "please set my alarm to {time}",
            "get me out of bed at {time}",
            "make sure I am awake by {time}",
            "can you wake me at {time}?",
            "I have to be up by {time}",
            "set the alarm clock for {time}",
            "ring me awake at {time}",
            "new alarm, {time}",
        ),
        test=(
            "could you set the alarm to go off at {time}?",
            "I want to be woken up at {time}",
            "don't let me sleep past {time}",
            "I need an alarm for {time}",
        ),
    ),
    Function(
        "get_weather",
        {"city": "city", "day": "day"},
        train=(
            "what is the weather in {city} {day}?",
            "weather in {city} {day}",
            "will it rain in {city} {day}?",
            "how warm will it be {day} in {city}?",
            "show me the forecast for {city} {day}",
            "do I need an umbrella in {city} {day}?",
            "is it going to be sunny {day} in {city}?",
            "tell me the weather {day} for {city}",
            "forecast {day}, {city}",
            "how is the weather going to be in {city} {day}?",
            "I am in {city} {day}, what will the weather be?",
            "will there be snow in {city} {day}?",
        ),
        test=(
            "what will the weather be like in {city} {day}?",
            "is it going to rain {day} in {city}?",
            "give me the {city} weather {day}",
            "how cold will it get in {city} {day}?",
        ),
    ),
    Function(
        "send_message",
        {"to": "person", "text": "message"},
        train=(
            "text {to}: {text}",
            "tell {to} that {text}",
            "send {to} a message saying {text}",
            "message {to} that {text}",
            "write to {to}: {text}",
            "let {to} know that {text}",
            "send a text to {to}: {text}",
            "please tell {to} {text}",
            "can you message {to}: {text}",
            "text {to} that {text}",
            "send this to {to}: {text}",
            "drop {to} a line: {text}",
        ),
        test=(
            "please let {to} know {text}",
            "send a message to {to} saying {text}",
            "write {to} a text that says {text}",
            "can you tell {to} that {text}",
        ),
    ),
    Function(
        "play_music",
        {"song": "song", "artist": "artist"},
        train=(
            "play {song} by {artist}",
            "put on {song} by {artist}",
            "I want to hear {song} by {artist}",
            "please play {artist} with {song}",
            "start {song} from {artist}",
            "can you play the song {song} by {artist}?",
            "let me listen to {song} by {artist}",
            "play me {artist}, {song}",
            "queue {song} by {artist}",
            "music please: {song} by {artist}",
            "play the track {song} from {artist}",
            "I feel like listening to {artist}, play {song}",
        ),
        test=(
            "could you put {song} by {artist} on?",
            "I would like to listen to {song} by {artist}",
            "turn on some music, {song} by {artist}",
            "play that song {song} from {artist}",
        ),
    ),
    Function(
        "convert_currency",
        {"amount": "amount", "from": "currency", "to": "currency"},
        train=(
            "convert {amount} {from} to {to}",
            "how much is {amount} {from} in {to}?",
            "change {amount} {from} into {to}",
            "what are {amount} {from} worth in {to}?",
            "{amount} {from} in {to}",
            "turn {amount} {from} into {to}",
            "I have {amount} {from}, how many {to} is that?",
            "exchange {amount} {from} for {to}",
            "give me {amount} {from} in {to}",
            "what is {amount} {from} in {to}?",
            "calculate {amount} {from} in {to}",
            "how many {to} do I get for {amount} {from}?",
            "how many {to} would {amount} {from} make?",
            "how many {to} can I buy with {amount} {from}?",
            "I need the price in {to} for {amount} {from}",
        ),
        test=(
            "how many {to} are {amount} {from}?",
            "please convert {amount} {from} into {to}",
            "what would {amount} {from} be in {to}?",
            "if I change {amount} {from} to {to}, how much do I get?",
        ),
    ),
    Function(
        "create_event",
        {"title": "event", "day": "day", "time": "time"},
        train=(
            "add {title} to my calendar {day} at {time}",
            "schedule {title} {day} at {time}",
            "put {title} in the calendar, {day} at {time}",
            "I have {title} {day} at {time}, note it down",
            "create an event: {title}, {day}, {time}",
            "book {title} {day} at {time}",
            "new event {day} at {time}: {title}",
            "plan {title} {day} at {time}",
            "calendar: {title} {day} {time}",
            "save the date, {title} {day} at {time}",
            "make an appointment {day} at {time} for {title}",
            "there is {title} {day} at {time}, add it",
        ),
        test=(
            "please put {title} on my calendar {day} at {time}",
            "can you schedule {title} {day} at {time}?",
            "make a calendar entry for {title} {day} at {time}",
            "{title} is {day} at {time}, add it to my calendar",
        ),
    ),
    Function(
        "set_light",
        {"room": "room", "state": "state"},
        train=(
            "turn {state} the light in the {room}",
            "turn the {room} light {state}",
            "switch the light in the {room} {state}",
            "{room} light {state}",
            "lights {state} in the {room}",
            "please switch {state} the {room} light",
            "I want the {room} light {state}",
            "make the light in the {room} go {state}",
            "put the {room} lights {state}",
            "light {state}, {room}",
            "can you turn the light {state} in the {room}?",
            "set the {room} lamp to {state}",
        ),
        test=(
            "could you switch the {room} light {state}?",
            "the lights in the {room} should go {state}",
            "the {room} light should be {state}",
            "please turn the lamp in the {room} {state}",
        ),
    ),
    Function(
        "set_thermostat",
        {"room": "room", "degrees": "degrees"},
        train=(
            "set the {room} to {degrees} degrees",
            "heat the {room} to {degrees} degrees",
            "make the {room} {degrees} degrees warm",
            "thermostat in the {room} to {degrees}",
            "I want {degrees} degrees in the {room}",
            "warm up the {room} to {degrees} degrees",
            "turn the heating in the {room} to {degrees}",
            "{room} temperature {degrees} degrees please",
            "change the {room} thermostat to {degrees}",
            "cool the {room} down to {degrees} degrees",
            "bring the {room} to {degrees} degrees",
            "keep it at {degrees} degrees in the {room}",
        ),
        test=(
            "set the temperature in the {room} to {degrees} degrees",
            "the {room} should be at {degrees} degrees",
            "put the {room} heating on {degrees} degrees",
            "can you get the {room} to {degrees} degrees?",
        ),
    ),
    Function(
        "find_restaurant",
        {"cuisine": "cuisine", "city": "city"},
        train=(
            "find a {cuisine} restaurant in {city}",
            "where can I eat {cuisine} food in {city}?",
            "I want {cuisine} food in {city}",
            "show me {cuisine} places in {city}",
            "look for {cuisine} restaurants in {city}",
            "good {cuisine} food in {city}?",
            "is there a {cuisine} restaurant in {city}?",
            "I am hungry, find something {cuisine} in {city}",
            "{cuisine} restaurant, {city}",
            "take me out for {cuisine} food in {city}",
            "in {city}, where do I get {cuisine} food?",
            "search {city} for {cuisine} restaurants",
        ),
        test=(
            "can you find me a {cuisine} restaurant in {city}?",
            "which {cuisine} restaurants are there in {city}?",
            "I would like to eat {cuisine} food in {city}",
            "recommend a {cuisine} place to eat in {city}",
        ),
    ),
)


def _copied(*lines: str) -> list[Value]:
    """Values that stand in the call as they are said, apart by commas; the lines are one text, wrapped anywhere."""
    return [(text.strip(), text.strip()) for text in " ".join(lines).split(",")]


def _pairs(firsts: str, seconds: str) -> list[Value]:
    """Every first word with every second, copied: many values, so that copying is what there is to learn."""
    said = [f"{first} {second}".replace("_", " ") for first in firsts.split() for second in seconds.split()]
    return [(text, text) for text in dict.fromkeys(said)]


def _times(minutes: Sequence[int]) -> list[Value]:
    """7 am -> 7:00 am, 9:40 pm -> 9:40 pm; twelve o'clock is left out: people do not agree on its am and pm."""
    values: list[Value] = []
    for hour in range(1, 12):
        for minute in minutes:
            clock = f"{hour}:{minute:02d}" if minute else f"{hour}"
            values += [(f"{clock} {half}", f"{hour}:{minute:02d} {half}") for half in ("am", "pm")]
    return values


def _numbers(numbers: Sequence[int]) -> list[Value]:
    return [(str(number), number) for number in numbers]


def _shared(values: list[Value]) -> dict[Split, list[Value]]:
    return {"train": values, "test": values}


WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VALUES: dict[str, dict[Split, list[Value]]] = {
    # the full hour twice, as people say it more often
    "time": {"train": _times((0, 0, 10, 15, 30, 45, 50)), "test": _times((0, 0, 5, 20, 25, 35, 40))},
    "day": _shared(_copied("today, tomorrow") + [(f"on {day}", day) for day in WEEKDAYS]),
    "room": _shared(_copied("kitchen, bedroom, bathroom, living room, hallway, office, garage, attic")),
    "state": _shared(_copied("on, off")),
    "currency": _shared(
        [("dollars", "USD"), ("euros", "EUR"), ("pounds", "GBP"), ("yen", "JPY"), ("francs", "CHF"), ("rupees", "INR")]
    ),
    "amount": {
        "train": _numbers([5, 10, 12, 20, 30, 45, 50, 60, 75, 80, 100, 120, 150, 200, 250, 300, 400, 500, 750, 1000]),
        "test": _numbers([15, 25, 35, 40, 70, 85, 90, 110, 140, 180, 220, 350, 450, 600, 900]),
    },
    "degrees": {"train": _numbers((16, 17, 19, 20, 22, 23, 25, 26)), "test": _numbers((15, 18, 21, 24))},
    "cuisine": {
        "train": _copied(
            "Italian, Chinese, Indian, Mexican, Thai, French, Greek, Turkish, Korean, Peruvian, Polish, Brazilian,",
            "Cuban, Moroccan, Persian, Swedish, Georgian, Syrian, Portuguese, German, Danish, Russian, Nepalese,",
            "Malaysian, Hawaiian, Egyptian, Irish, Austrian, Israeli, Jamaican",
        ),
        "test": _copied("Japanese, Spanish, Vietnamese, Lebanese, Ethiopian"),
    },
    "city": {
        "train": _copied(
            "London, Paris, Berlin, Madrid, Rome, Vienna, Oslo, Dublin, Prague, Tokyo, Chicago, Boston, Denver,",
            "Toronto, Sydney, Mumbai, Cairo, Lima, Seattle, New York, Hamburg",
        ),
        "test": _copied(
            "Lisbon, Athens, Munich, Warsaw, Helsinki, Dallas, Miami, Montreal, Melbourne, Nairobi, Seoul, San",
            "Diego",
        ),
    },
    "person": {
        "train": _copied(
            "Anna, Ben, Carla, David, Emma, Frank, Grace, Henry, Ida, Jack, Kate, Leo, Maria, Nina, Oscar,",
            "Paul, Rosa, Sam, Tina, Victor, Mom, Dad, my boss, Mrs. Lee",
        ),
        "test": _copied("Alice, Bruno, Clara, Daniel, Eva, George, Helen, Lucas, Sarah, Tom"),
    },
    "message": {
        "train": _copied(
            "I am running late, dinner is ready, I will call back later, the train is delayed, we need more",
            "milk, the meeting is moved to Friday, I am on my way, the package has arrived, I forgot my keys,",
            "the bill is paid, the movie starts at eight, I cannot come tonight, she likes the idea, the car is",
            "fixed, we meet at the station, lunch is on me, the kids are asleep, I left work early, the door is",
            "open, we won the game, there is no bread left, my phone is broken, the flight was cancelled, I won",
            "the race",
        ),
        "test": _copied(
            "I am stuck in traffic, the pizza is here, I will be home soon, the bus is late, we are out of",
            "coffee, I found your wallet, the party starts at nine, the doctor called back, I passed the exam,",
            "the cat is hungry, the heating is broken, I got the new job",
        ),
    },
    "song": {
        "train": _pairs(
            "Silver Blue Midnight Golden Paper Summer Wild Broken Sweet Cold Open Crystal Hidden Burning Lonely Purple",
            "Rain Road Days Moon River Clocks Home Stars Coffee Sea Mirror Garden Letters Shadows Mountain Dream",
        ),
        "test": _copied(
            "Green Light, Winter Sun, Empty Streets, Falling Leaves, Long Way Back, Northern Sky, Velvet Night,",
            "Morning Train",
        ),
    },
    "artist": {
        "train": _pairs(
            "Maya Johnny Luna Ella Simon Daisy Oscar Ruby", "Stone Reed Park Brooks Gray Miller Harper Quinn"
        )
        + _pairs("the", "Owls Foxes Sailors Dogs Pilots Wolves Gardeners Strangers")
        + _pairs("Red Iron Quiet Electric Northern Velvet", "Harbor Garden Machine Orchestra Station Machine Circus"),
        "test": _copied("Nora Fields, the Tall Trees, Silent Parade, Peter Lane, the River Kings, Amber Hill"),
    },
    "event": {
        "train": _copied(
            "dentist, team meeting, lunch with Anna, yoga class, piano lesson, parents' evening, haircut, job",
            "interview, football practice, book club, car inspection, dinner with Paul, guitar lesson, budget",
            "review, swimming class, birthday party",
        )
        + _pairs(
            "chemistry drawing cooking boxing poetry orchestra theatre rowing", "class lesson club practice rehearsal"
        )
        + _pairs("lunch breakfast tea brunch", "with_Ben with_Grace with_Henry with_Maria with_Oscar with_Rosa"),
        "test": _copied(
            "eye doctor, project review, coffee with Clara, dance class, choir practice, house viewing, chess",
            "club, tennis lesson",
        ),
    },
}
