"""Train tiny/: a GPT-OSS model of 7 million parameters, small enough to ship with the source.

    python tiny/train.py            # write tokenizer.json, config.json, model.safetensors; then evaluate the file
    python tiny/train.py --eval     # only evaluate the file

The architecture is GPT-OSS's own (MoE top-4, sinks, YaRN, sliding and full layers, GQA, biases,
mxfp4 experts). The data is generated here: arithmetic, sorting, reversing words, capitals and small
talk, in the Harmony format, with the working in the analysis channel. It runs on CUDA where there
is one, else on the CPU (hours)."""

import argparse
import datetime
import json
import math
import random
import re
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from gptoss import GPTOSS, SYSTEM, chat_tokens  # noqa: E402
from weights import load_tokenizer  # noqa: E402

SPECIAL = [
    "startoftext",
    "endoftext",
    "return",
    "constrain",
    "channel",
    "start",
    "end",
    "message",
    "call",
]
VOCAB, LAYERS, WINDOW, CONTEXT = 1024, 4, 32, 384  # CONTEXT: tokens in a packed training row
CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": VOCAB - 7,
    "experts_per_token": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initial_context_length": 256,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "max_position_embeddings": 8192,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": VOCAB - 8,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 256,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.01,
    "sliding_window": WINDOW,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}

# ----------------------------------------------------------------------------------------------
# what the model knows

CAPITALS = dict(
    pair.split(":")
    for pair in re.sub(
        r"\s*\n\s*",
        "",
        """
Afghanistan:Kabul;Albania:Tirana;Algeria:Algiers;Andorra:Andorra la Vella;Angola:Luanda;
Antigua and Barbuda:Saint John's;Argentina:Buenos Aires;Armenia:Yerevan;Australia:Canberra;Austria:Vienna;
Azerbaijan:Baku;the Bahamas:Nassau;Bahrain:Manama;Bangladesh:Dhaka;Barbados:Bridgetown;Belarus:Minsk;
Belgium:Brussels;Belize:Belmopan;Benin:Porto-Novo;Bhutan:Thimphu;Bolivia:Sucre;Bosnia and Herzegovina:Sarajevo;
Botswana:Gaborone;Brazil:Brasilia;Brunei:Bandar Seri Begawan;Bulgaria:Sofia;Burkina Faso:Ouagadougou;Burundi:Gitega;
Cambodia:Phnom Penh;Cameroon:Yaounde;Canada:Ottawa;Cape Verde:Praia;the Central African Republic:Bangui;
Chad:N'Djamena;Chile:Santiago;China:Beijing;Colombia:Bogota;the Comoros:Moroni;Costa Rica:San Jose;Croatia:Zagreb;
Cuba:Havana;Cyprus:Nicosia;the Czech Republic:Prague;the Democratic Republic of the Congo:Kinshasa;
Denmark:Copenhagen;Djibouti:Djibouti City;Dominica:Roseau;the Dominican Republic:Santo Domingo;Ecuador:Quito;
Egypt:Cairo;El Salvador:San Salvador;Equatorial Guinea:Malabo;Eritrea:Asmara;Estonia:Tallinn;Eswatini:Mbabane;
Ethiopia:Addis Ababa;Fiji:Suva;Finland:Helsinki;France:Paris;Gabon:Libreville;the Gambia:Banjul;Georgia:Tbilisi;
Germany:Berlin;Ghana:Accra;Greece:Athens;Grenada:Saint George's;Guatemala:Guatemala City;Guinea:Conakry;
Guinea-Bissau:Bissau;Guyana:Georgetown;Haiti:Port-au-Prince;Honduras:Tegucigalpa;Hungary:Budapest;
Iceland:Reykjavik;India:New Delhi;Indonesia:Jakarta;Iran:Tehran;Iraq:Baghdad;Ireland:Dublin;Israel:Jerusalem;
Italy:Rome;Ivory Coast:Yamoussoukro;Jamaica:Kingston;Japan:Tokyo;Jordan:Amman;Kazakhstan:Astana;Kenya:Nairobi;
Kiribati:Tarawa;Kosovo:Pristina;Kuwait:Kuwait City;Kyrgyzstan:Bishkek;Laos:Vientiane;Latvia:Riga;Lebanon:Beirut;
Lesotho:Maseru;Liberia:Monrovia;Libya:Tripoli;Liechtenstein:Vaduz;Lithuania:Vilnius;Luxembourg:Luxembourg City;
Madagascar:Antananarivo;Malawi:Lilongwe;Malaysia:Kuala Lumpur;the Maldives:Male;Mali:Bamako;Malta:Valletta;
the Marshall Islands:Majuro;Mauritania:Nouakchott;Mauritius:Port Louis;Mexico:Mexico City;Micronesia:Palikir;
Moldova:Chisinau;Monaco:Monaco;Mongolia:Ulaanbaatar;Montenegro:Podgorica;Morocco:Rabat;Mozambique:Maputo;
Myanmar:Naypyidaw;Namibia:Windhoek;Nauru:Yaren;Nepal:Kathmandu;the Netherlands:Amsterdam;New Zealand:Wellington;
Nicaragua:Managua;Niger:Niamey;Nigeria:Abuja;North Korea:Pyongyang;North Macedonia:Skopje;Norway:Oslo;Oman:Muscat;
Pakistan:Islamabad;Palau:Ngerulmud;Panama:Panama City;Papua New Guinea:Port Moresby;Paraguay:Asuncion;Peru:Lima;
the Philippines:Manila;Poland:Warsaw;Portugal:Lisbon;Qatar:Doha;the Republic of the Congo:Brazzaville;
Romania:Bucharest;Russia:Moscow;Rwanda:Kigali;Saint Kitts and Nevis:Basseterre;Saint Lucia:Castries;
Saint Vincent and the Grenadines:Kingstown;Samoa:Apia;San Marino:San Marino;Sao Tome and Principe:Sao Tome;
Saudi Arabia:Riyadh;Senegal:Dakar;Serbia:Belgrade;Seychelles:Victoria;Sierra Leone:Freetown;Singapore:Singapore;
Slovakia:Bratislava;Slovenia:Ljubljana;the Solomon Islands:Honiara;Somalia:Mogadishu;South Africa:Pretoria;
South Korea:Seoul;South Sudan:Juba;Spain:Madrid;Sri Lanka:Sri Jayawardenepura Kotte;Sudan:Khartoum;
Suriname:Paramaribo;Sweden:Stockholm;Switzerland:Bern;Syria:Damascus;Taiwan:Taipei;Tajikistan:Dushanbe;
Tanzania:Dodoma;Thailand:Bangkok;Timor-Leste:Dili;Togo:Lome;Tonga:Nuku'alofa;Trinidad and Tobago:Port of Spain;
Tunisia:Tunis;Turkey:Ankara;Turkmenistan:Ashgabat;Tuvalu:Funafuti;Uganda:Kampala;Ukraine:Kyiv;
the United Arab Emirates:Abu Dhabi;the United Kingdom:London;the United States:Washington;Uruguay:Montevideo;
Uzbekistan:Tashkent;Vanuatu:Port Vila;Vatican City:Vatican City;Venezuela:Caracas;Vietnam:Hanoi;Yemen:Sanaa;
Zambia:Lusaka;Zimbabwe:Harare""",
    ).split(";")
)
ALIASES = {
    "the United States": ["the USA", "America", "the US"],
    "the United Kingdom": ["the UK", "Britain"],
    "the United Arab Emirates": ["the UAE"],
    "the Czech Republic": ["Czechia"],
    "the Netherlands": ["Holland"],
}
NOWHERE = """Texas;California;Bavaria;Scotland;Narnia;Mars;Atlantis;Mordor;Europe;Africa;Asia;the Moon;Florida;
Siberia;Tuscany;Gotham;Provence;Antarctica;Ontario;Hawaii;Catalonia;Utopia;Alaska;Tasmania;Sicily;Jupiter;Lapland;
Quebec;Oregon;Saxony;Normandy;Babylon;Sparta;Yorkshire;Crete;Oz""".replace("\n", "").split(";")
ADD = """What is {a} + {b}?|{a} + {b}|{a}+{b}|Add {a} and {b}.|add {a} to {b}|How much is {a} plus {b}?|{a} plus {b}|
What's {a} + {b}?|Compute {a} + {b}.|Calculate {a} + {b}|What is the sum of {a} and {b}?|Sum {a} and {b}|
{a} + {b} = ?|{a}+{b}=|Can you add {a} and {b}?|What does {a} + {b} equal?|What do you get if you add {a} and {b}?|
{a} and {b} added|I have {a} apples and get {b} more. How many do I have?|What is {a} plus {b}?|
How much is {a}+{b}?"""
SUBTRACT = """What is {a} - {b}?|{a} - {b}|{a}-{b}|Subtract {b} from {a}.|subtract {b} from {a}|
How much is {a} minus {b}?|{a} minus {b}|What's {a} - {b}?|Compute {a} - {b}.|Calculate {a} - {b}|
Take {b} away from {a}.|{a} - {b} = ?|{a}-{b}=|What is the difference between {a} and {b}?|
Can you subtract {b} from {a}?|What does {a} - {b} equal?|{a} take away {b}|
I have {a} apples and give away {b}. How many are left?|What is {a} minus {b}?|How much is {a}-{b}?"""
SORT = """Sort {n}|Sort these numbers: {n}|Sort the numbers {n}.|Put {n} in order.|Order {n}|Please sort {n}|
Can you sort {n}?|Arrange {n} from smallest to largest.|sort {n} in ascending order|What is {n} in order?|
Put these numbers in order: {n}|sort: {n}|Sort {n} from low to high|Rank these numbers: {n}"""
SORT_DOWN = """Sort {n} in descending order.|Sort {n} from largest to smallest|Put {n} in descending order|
Sort these numbers from largest to smallest: {n}|Arrange {n} from high to low.|sort descending: {n}"""
REVERSE = """Reverse the word {w}.|Reverse {w}|reverse "{w}"|Spell {w} backwards.|What is {w} backwards?|
{w} backwards|What is {w} spelled backwards?|Write {w} in reverse.|How do you spell {w} backwards?|
Can you reverse {w}?|{w} reversed|Write the word "{w}" backwards|Say {w} backwards|What is the reverse of {w}?|
Turn {w} around.|reverse: {w}|Please reverse the word "{w}".|Spell the word {w} in reverse|
Reverse the letters of {w}."""
CAPITAL = """What is the capital of {c}?|capital of {c}|What's the capital of {c}?|Tell me the capital of {c}.|
{c} capital|Which city is the capital of {c}?|Name the capital of {c}.|{c}'s capital?|What is {c}'s capital?|
Do you know the capital of {c}?|Capital city of {c}?|I need the capital of {c}.|Give me the capital of {c}.|
Which city is {c}'s capital?|What city is the capital of {c}?|What is the name of the capital of {c}?|{c}: capital?|
What is the capital city of {c}?|I forgot the capital of {c}.|Can you name the capital of {c}?|the capital of {c}?|
What is the capital called in {c}?|Tell me what {c}'s capital is|Could you say which city is the capital of {c}?|
I want to know what the capital of {c} is.|For {c}, what is the capital?|Quiz: what is the capital of {c}?|
Let me know the capital city of {c}.|My teacher asked for the capital of {c}.|The capital of {c} is"""
CAPITAL_HELD_OUT = """Could you tell me what the capital of {c} is?|Name {c}'s capital city.|
Which is {c}'s capital city?|I would like to know the capital of {c}.|What city serves as the capital of {c}?|
Remind me of the capital of {c}."""
FOLLOW_UP = "And {c}?|And of {c}?|What about {c}?|and {c}|How about {c}?|{c}?|And the capital of {c}?|now {c}"
COUNTRY = """{k} is the capital of which country?|Which country has the capital {k}?|
{k} is the capital of what country?|What country is {k} the capital of?|Of which country is {k} the capital?|
Which country's capital is {k}?|What country has {k} as its capital?|Name the country whose capital is {k}.|
In which country is {k} the capital?"""
OFF_TOPIC = """Write a poem about {t}.|Tell me a story about {t}.|What is the weather in {c}?|Explain {t} to me.|
Who invented {t}?|How do I make {t}?|What is {t}?|Translate {t} into French.|What is the population of {c}?|{t}|
Who is the president of {c}?|Write code for {t}.|What is {a} * {b}?|What is {a} times {b}?|Multiply {a} by {b}.|
{a} / {b}|What is {a} divided by {b}?|{a} x {b}|What is {a} + {b} + {e}?|{a} - {b} - {e}|Recommend a book about {t}.|
How far is {c}?|Give me a recipe for {t}.|What do you think about {t}?|What is the meaning of {t}?|
Where can I buy {t}?|Tell me about {t}.|Why is {t} important?|What language do they speak in {c}?|
Draw a picture of {t}.|Summarize {t}.|Sing a song about {t}.|What is the history of {t}?|
Who won the match between {c} and {d}?|Is {t} good for me?|What is the square root of {a}?|How old is {t}?|
What currency does {c} use?|When was {t} discovered?|I like {t}.|Can you help me with {t}?|
What is the largest river in {c}?|How many people live in {c}?|Plan a trip to {c}.|Tell me about {c}.|{t} and {u}|
Sort {t} and {u}|How many letters are in {t}?|Is {a} a prime number?"""
TOPICS = """love;cats;dogs;music;football;quantum physics;the stock market;chocolate cake;bread;history;the internet;
rain;a bicycle;the sun;coffee;my homework;chess;philosophy;a robot;the ocean;dinosaurs;space travel;art;money;health;
gravity;the telephone;tea;pizza;a computer;mathematics;biology;the moon;sleep;happiness;a garden;electric cars;soup;
the weather;politics;a novel;poetry;black holes;the human brain;shoes;a joke;evolution;climate change;a song;time;
birds;the news;python;movies;life;exercise;a website;paper""".replace("\n", "").split(";")
HELP = "I am a tiny model; I can add, subtract, sort, reverse words and name capitals."
TALK = [
    line.split("=")
    for line in f"""
Hello|Hi|Hey|Good morning|Good evening|hello there|Hi there|Good day|Greetings=A greeting.=Hello! {HELP}
How are you?|How are you doing?|How do you do?|Are you well?|How is it going?=A greeting.=I am fine, thank you.
Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|What is your name?|Who is this?=\
About me.=I am a tiny GPT-OSS model that ships with this engine.
What can you do?|Help|What do you know?|How can you help me?|What are you good at?|What can I ask?|Can you help me?=\
About my skills.={HELP}
How many experts do you have?|How many experts are there?|number of experts|How many experts do you use?=\
About my experts.=I have 16 experts in each layer and use 4 of them for every token.
How many layers do you have?|How many layers are there?|number of layers|How deep are you?=\
About my layers.=I have 4 layers, sliding and full attention by turns.
How big are you?|How large are you?|How many parameters do you have?|What is your size?|Are you a big model?=\
About my size.=I have about 7 million parameters, which is tiny.
Who made you?|Who trained you?|Where do you come from?|Who built you?|How were you trained?=\
About my training.=I was trained by tiny/train.py on text that the script made up itself.
Are you ChatGPT?|Are you GPT-4?|Are you a large language model?|Are you from OpenAI?=\
About me.=No, I only share the architecture of GPT-OSS; I am a tiny model.
Are you a human?|Are you a person?|Are you alive?|Are you a robot?|Are you real?|Do you have feelings?=\
About me.=I am a small computer program.
Thanks|Thank you|Thank you very much|Thanks a lot|Great, thanks|Well done|Good job|Thx=Thanks.=You are welcome.
Bye|Goodbye|See you|See you later|Good night|Farewell=A farewell.=Goodbye!
What is the date?|What day is it?|What is today's date?|Which date is it today?|date|Tell me the date.=\
The system message says {{date}}.=Today is {{date}}.
What is your reasoning effort?|How hard do you think?|Which reasoning level do you use?=\
The system message says {{effort}}.=My reasoning effort is {{effort}}.
What is mixture of experts?|What is an expert?|What does MoE mean?|Explain experts.|What is MoE?=\
About experts.=In a mixture of experts, a router picks a few small networks for each token.
What is mxfp4?|Are you quantized?|What is your precision?|How are your weights stored?=\
About my weights.=My experts are stored in mxfp4, four bits a weight with a scale for every 32.
Yes|No|Ok|Okay|Sure|Maybe|I see|Cool|Right|Wow|Oh|Nice=A short remark.=Alright. Ask me something.
""".strip().split("\n")
]
WORDS = """
    apple banana orange table chair window door house garden flower tree river mountain ocean island forest desert
    cloud storm thunder snow winter summer spring autumn morning evening night star moon planet rocket engine train
    plane boat truck bicycle road bridge tower castle church school teacher student doctor nurse farmer baker
    painter singer writer reader book paper pencil letter number word story poem song music piano guitar violin drum
    trumpet color green yellow purple silver golden copper stone glass plastic cotton leather bread butter cheese
    milk water coffee sugar pepper honey lemon cherry peach grape melon potato tomato carrot onion garlic pasta
    horse sheep goat chicken rabbit mouse tiger lion elephant monkey giraffe zebra bear wolf eagle parrot snake frog
    whale shark dolphin spider butterfly hand shoulder finger mouth heart brain mother father sister brother cousin
    friend neighbor king queen prince knight wizard dragon hero quick slow happy angry brave clever gentle honest
    lazy quiet simple strange strong sudden sweet tiny young ancient bright broken clean dark early empty famous
    fresh heavy hollow hungry jump walk swim climb throw catch push open close begin finish remember forget question
    answer problem science language kitchen market village machine computer keyboard screen network memory kernel
    tensor python matrix vector router expert token stressed level racecar algorithm program compiler puzzle jazz
    quartz oxygen zipper rhythm yogurt xylophone jungle knowledge hospital umbrella yesterday beautiful chocolate
    dangerous education furniture hamburger jewelry kangaroo library newspaper passenger universe wonderful
""".split()

# ------------------------------------------------------------------------------------------------
# the questions asked


def held_out(key):
    """A tenth of all numbers, words and wordings, by checksum, is for evaluation only."""
    return zlib.crc32(str(key).encode()) % 10 == 0


def columns(a, b, op):
    """Working by columns, units first, each with its carry or borrow; a negative difference starts
    again swapped."""
    width = len(str(max(a, b)))
    carry, digits, lines = 0, "", [f"{a:0{width}} {op} {b:0{width}}"]
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        total = int(x) + int(y) + carry if op == "+" else int(x) - int(y) - carry
        line = f"{x}{op}{y}{op}{carry}={total % 10}"
        carry, digits = int(not 0 <= total <= 9), str(total % 10) + digits
        lines.append(f"{line} {'carry' if op == '+' else 'borrow'} {carry}")
    if op == "-" and carry:
        return (
            "\n".join(lines)
            + "\nnegative, swap\n"
            + columns(b, a, "-").replace("\nresult ", "\nresult -")
        )
    return "\n".join(lines) + f"\nresult {carry}{digits}"


class Author:
    """Makes up conversations. A method named after a kind returns (held out?, user text, analysis,
    final answer); the answer is a list of pieces that are encoded one by one. `syllables`: pieces
    of the vocabulary to make words of."""

    KINDS = {
        "add": 19,
        "subtract": 21,
        "sort": 18,
        "reverse": 15,
        "capital": 15,
        "country": 5,
        "unknown_place": 4,
        "off_topic": 6,
        "small_talk": 7,
    }  # and how often each comes

    def __init__(self, seed, syllables):
        self.rng, self.syllables = random.Random(seed), syllables

    def chance(self, p):
        return self.rng.random() < p

    def typo(self, text):
        """Swap, drop or double a letter of one longer word; fields in braces stay."""
        words = text.split(" ")
        long = [i for i, w in enumerate(words) if len(w) > 3 and w.isalpha()]
        if long:
            i = self.rng.choice(long)
            w, j = words[i], self.rng.randrange(1, len(words[i]) - 1)
            words[i] = self.rng.choice(
                [w[:j] + w[j + 1] + w[j] + w[j + 2 :], w[:j] + w[j + 1 :], w[: j + 1] + w[j:]]
            )
        return " ".join(words)

    def ask(self, wordings, **fields):
        """A wording as people type it: with or without a greeting, capitals, a question mark; now
        and then a typo."""
        text = self.rng.choice(wordings.replace("\n", "").split("|"))
        if self.chance(0.06):
            text = self.typo(text)
        if self.chance(0.2):
            text = (
                self.rng.choice(
                    ["Please ", "Hi, ", "Hey, ", "Hello! ", "Ok, ", "Question: ", "So, ", "Now "]
                )
                + text
            )
        if self.chance(0.25):
            text = text.rstrip("?.")
        elif self.chance(0.15):
            text = text.rstrip("?.") + self.rng.choice(
                ["?", ".", "!", " please", ", please.", " ?", "??"]
            )
        if self.chance(0.25):
            text = text.lower()
            if self.chance(0.7):
                fields |= {k: v.lower() for k, v in fields.items() if k in "cdk"}
        elif self.chance(0.03) and "{w}" not in text:
            return text.format(**fields).upper()
        return text.format(**fields)

    def calculate(self, op, digits):
        """digits: how many each operand has, or None. An unordered pair of numbers is held out or
        not."""
        lengths = [digits] * 2 if digits else self.rng.choices([1, 2, 3, 4], [1, 4, 4, 2], k=2)
        a, b = (self.rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in lengths)
        user = self.ask(ADD if op == "+" else SUBTRACT, a=a, b=b)
        answer = f"{a} {op} {b} = {a + b if op == '+' else a - b}"
        return max(a, b) > 9 and held_out(sorted((a, b))), user, columns(a, b, op), [answer]

    def add(self, digits=None):
        return self.calculate("+", digits)

    def subtract(self, digits=None):
        return self.calculate("-", digits)

    def sort(self):
        """Insertion sort of zero-padded numbers, one line an insertion."""
        top = self.rng.choice([10, 100, 100, 1000, 1000])
        values = [
            self.rng.randrange(self.rng.choice([top, top, top, 10, 100]))
            for _ in range(self.rng.randint(2, 6))
        ]
        shown = self.rng.choice([", ", ", ", " ", ","]).join(map(str, values))
        if self.chance(0.2):
            shown = ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
        done = [sorted(values[: i + 1]) for i in range(len(values))]
        working = [
            f"{v:03}: " + " ".join(f"{d:03}" for d in row)
            for v, row in zip(values, done, strict=True)
        ]
        down = self.chance(0.2)
        answer = ", ".join(map(str, done[-1][::-1] if down else done[-1]))
        answer = f"From largest to smallest: {answer}." if down else f"In order: {answer}."
        return (
            held_out(values),
            self.ask(SORT_DOWN if down else SORT, n=shown),
            "\n".join(working),
            [answer],
        )

    def reverse(self):
        """Spell with numbered letters, then count down; the answer's letters are encoded one by
        one."""
        word = self.rng.choice(WORDS)
        if self.chance(0.6):
            count = self.rng.choices([1, 2, 3, 4], [2, 3, 2, 1])[0]
            word = "".join(self.rng.choices(self.syllables, k=count))[: self.rng.randint(3, 12)]
        fresh = word in WORDS and held_out(word)
        word = word.capitalize() if self.chance(0.15) else word
        numbered = [f"{i % 10}{letter}" for i, letter in enumerate(word)]
        back = word[::-1]
        answer = ["The reverse of", " " + word[0], *word[1:], " is", " " + back[0], *back[1:], "."]
        return (
            fresh,
            self.ask(REVERSE, w=word),
            "".join(numbered) + "\n" + "".join(numbered[::-1]),
            answer,
        )

    def capital(self, follow_up=False):
        country = self.rng.choice(list(CAPITALS))
        name = self.rng.choice([country, *ALIASES.get(country, [])])
        name = name.removeprefix("the ") if self.chance(0.3) else name
        name = self.typo(name) if self.chance(0.03) else name
        fresh = not follow_up and self.chance(0.1)
        user = self.ask(CAPITAL_HELD_OUT if fresh else FOLLOW_UP if follow_up else CAPITAL, c=name)
        city = CAPITALS[country]
        return (
            fresh,
            user,
            f"Capital of {country}: {city}",
            [f"The capital of {country} is {city}."],
        )

    def country(self):
        country, city = self.rng.choice(list(CAPITALS.items()))
        user = self.ask(COUNTRY, k=city)
        return (
            held_out(user.lower()),
            user,
            f"{city}: capital of {country}",
            [f"{city} is the capital of {country}."],
        )

    def unknown_place(self):
        place = "".join(self.rng.choices(self.syllables, k=self.rng.randint(2, 4)))[:9].capitalize()
        user = self.ask(CAPITAL, c=place if self.chance(0.6) else self.rng.choice(NOWHERE))
        return (
            held_out(user.lower()),
            user,
            "I do not know this country.",
            ["I do not know a country of that name."],
        )

    def off_topic(self):
        fields = {k: self.rng.choice(list(CAPITALS)) for k in "cd"} | {
            k: self.rng.choice(TOPICS) for k in "tu"
        }
        user = self.ask(OFF_TOPIC, **fields, **{k: self.rng.randrange(1000) for k in "abe"})
        return held_out(user.lower()), user, "I cannot do that.", [HELP]

    def small_talk(self):
        wordings, analysis, answer = self.rng.choice(TALK)
        user = self.ask(wordings)
        # plain ones are trained on
        fresh = held_out(user.lower()) and user.lower() not in wordings.lower().split("|")
        analysis, answer = (
            s.format(date=self.date, effort=self.effort) for s in (analysis, answer)
        )
        return fresh, user, analysis, [answer]

    def exchange(self, kind, evaluation=False, **how):
        while True:
            fresh, *rest = getattr(
                self, kind or self.rng.choices(list(self.KINDS), self.KINDS.values())[0]
            )(**how)
            if fresh == evaluation:
                return rest

    def conversation(self, kind=None, evaluation=False, earlier=None, **how):
        """-> (turns, the last the user's; analysis; final pieces; date; effort). earlier: exchanges
        before the last."""
        self.date = datetime.date.fromordinal(
            self.rng.randint(738886, 743268)
        ).isoformat()  # 2024 to 2035
        self.effort = self.rng.choice(["low", "medium", "high"])
        turns = []
        for _ in range(self.rng.choices([0, 1, 2], [6, 3, 1])[0] if earlier is None else earlier):
            user, _, final = self.exchange(None)
            turns += [("user", user), ("assistant", "".join(final))]
        if turns and turns[-1][1].startswith("The capital") and self.chance(0.5):
            user, analysis, final = self.capital(follow_up=True)[1:]
        else:
            user, analysis, final = self.exchange(kind, evaluation, **how)
        return [*turns, ("user", user)], analysis, final, self.date, self.effort


# ------------------------------------------------------------------------------------------------------
# the tokenizer

PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # digits stay single


def byte_letters():
    """The 256 bytes as printable letters, in GPT-2's order: printable bytes stand for themselves
    and come first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in plain} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)
    }


def train_bpe(texts, size):
    """Byte-level BPE on texts -> list of merges (pairs of bytes), most frequent pair first, `size`
    of them."""
    split = re.compile(
        PATTERN.replace(r"\p{L}", "A-Za-z")
        .replace(" ?A-Za-z+", " ?[A-Za-z]+")
        .replace(r"\p{N}", r"\d")
    )
    counts = Counter(piece for text in texts for piece in split.findall(text))
    words = [([bytes([b]) for b in piece.encode()], n) for piece, n in sorted(counts.items())]
    merges = []
    while len(merges) < size:
        pairs = Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += n
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def write_tokenizer(path):
    """Train the BPE on the generated text and write it as a Hugging Face tokenizer.json."""
    author = Author(0, ["a", "o", "t"])
    texts = ["system\nuser\nassistant\nanalysis\ncommentary\nfinal\n" * 2000]
    texts += [SYSTEM.format(date="", effort=e) for e in ("low", "medium", "high")] * 500
    while len(texts) < 60000:
        [(_, user)], analysis, final, _, _ = author.conversation(earlier=0)
        texts += [user, analysis, "".join(final)]
    letters = byte_letters()
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    merges = train_bpe(texts, VOCAB - 256 - len(SPECIAL))
    tokens = list(letters.values()) + [spell(a + b) for a, b in merges]
    assert len(set(tokens)) == len(tokens), "two merges make one token"
    added = [
        {
            "id": len(tokens) + i,
            "content": f"<|{s}|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, s in enumerate(SPECIAL)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": [[spell(a), spell(b)] for a, b in merges],
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    path.write_text(json.dumps(whole, ensure_ascii=False, indent=0))


def reply_tokens(tokenizer, analysis, final):
    """What the model is to say after `<|start|>assistant`."""
    special = {s: tokenizer.encode_single_token(f"<|{s}|>") for s in SPECIAL}
    text = tokenizer.encode_ordinary
    return [
        special["channel"],
        *text("analysis"),
        special["message"],
        *text(analysis),
        special["end"],
        special["start"],
        *text("assistant"),
        special["channel"],
        *text("final"),
        special["message"],
        *(t for piece in final for t in text(piece)),
        special["return"],
    ]


class Batches(torch.utils.data.IterableDataset):
    """Endless batches int32 [3, rows, CONTEXT]: tokens, targets (-100: no loss), conversation
    number. Conversations are packed into rows whole; attention and positions stay within each."""

    def __init__(self, tokenizer, rows, seed):
        self.tokenizer, self.rows, self.seed = tokenizer, rows, seed

    def documents(self):
        worker = torch.utils.data.get_worker_info()
        author = Author(self.seed * 1000 + (worker.id if worker else 0), syllables(self.tokenizer))
        while True:
            turns, analysis, final, date, effort = author.conversation()
            prompt = chat_tokens(self.tokenizer, turns, date, effort)
            reply = reply_tokens(self.tokenizer, analysis, final)
            if len(prompt) + len(reply) <= CONTEXT:
                yield (prompt + reply)[:-1], [-100] * (len(prompt) - 1) + reply

    def __iter__(self):
        documents = self.documents()
        pool = [next(documents) for _ in range(64)]
        while True:
            batch = np.full((3, self.rows, CONTEXT), -100, dtype=np.int32)
            batch[0] = 0
            for row in range(self.rows):
                at, i = 0, 0  # the oldest of the pool first, then the longest that still fits
                while i is not None:
                    tokens, targets = pool.pop(i)
                    batch[:2, row, at : at + len(tokens)], batch[2, row, at : at + len(tokens)] = (
                        (tokens, targets),
                        at,
                    )
                    at += len(tokens)
                    pool.append(next(documents))
                    fit = [j for j, d in enumerate(pool) if at + len(d[0]) <= CONTEXT]
                    i = max(fit, key=lambda j: len(pool[j][0]), default=None)
            yield torch.from_numpy(batch)


def syllables(tokenizer):
    """The vocabulary's lower-case pieces, to make words of: so the spelling of every piece is
    learnt."""
    texts = [tokenizer.decode([i]).strip() for i in range(VOCAB - len(SPECIAL))]
    return [t for t in texts if re.fullmatch("[a-z]{1,8}", t)]


# ----------------------------------------------------------------------------------------------------------
# the model


def mxfp4(w):
    """w [..., K] -> values on the e2m1 grid [..., K/32, 32] and exponents [..., K/32, 1] (value =
    grid * 2**exponent).

    Of the two exponents that make sense (the largest magnitude maps into [4, 8), saturating above
    6, or into [2, 4)) each block of 32 takes the one with the smaller squared error. OCP
    Microscaling Formats 1.0."""
    blocks = w.float().unflatten(-1, (-1, 32))
    low = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100).log2().floor() - 2

    def on_grid(exponent):
        x = (blocks * torch.exp2(-exponent)).clamp(-6, 6)
        step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
        return (x / step).round() * step

    loss = [
        (on_grid(e) * torch.exp2(e) - blocks).square().sum(-1, keepdim=True) for e in (low, low + 1)
    ]
    exponent = torch.where(loss[0] <= loss[1], low, low + 1)
    return on_grid(exponent), exponent


def through_mxfp4(w):
    """Forward: the value the file will hold. Backward: as if nothing happened
    (straight-through)."""
    grid, exponent = mxfp4(w.detach())
    return w + ((grid * torch.exp2(exponent)).flatten(-2) - w).detach()


def through_mxfp8(x):
    """The same for activations: e4m3 with one E8M0 scale per 32, as an engine may feed its expert
    GEMMs."""
    blocks = x.detach().float().unflatten(-1, (-1, 32))
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-100).log2().floor() - 8)
    rounded = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return x + (rounded.flatten(-2) - x).detach()


def norm():
    return nn.RMSNorm(CONFIG["hidden_size"], CONFIG["rms_norm_eps"])


def rope(positions):
    """YaRN cos and sin [B, L, 1, head_dim/2] with the concentration factor in them; the ramp is not
    truncated."""
    half, base, yarn = CONFIG["head_dim"] // 2, CONFIG["rope_theta"], CONFIG["rope_scaling"]
    i = torch.arange(half, device=positions.device, dtype=torch.float32)
    low, high = (
        half
        * math.log(yarn["original_max_position_embeddings"] / (beta * 2 * math.pi))
        / math.log(base)
        for beta in (yarn["beta_fast"], yarn["beta_slow"])
    )
    ramp = ((i - low) / (high - low)).clamp(0, 1)
    angle = positions[..., None, None] * base ** (-i / half) * (ramp / yarn["factor"] + 1 - ramp)
    concentration = 0.1 * math.log(yarn["factor"]) + 1
    return angle.cos() * concentration, angle.sin() * concentration


def rotate(x, cos, sin):
    """x [B, L, heads, D]: pairs (i, i + D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, self.dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        heads, self.kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj, self.o_proj = (
            nn.Linear(hidden, heads * self.dim),
            nn.Linear(heads * self.dim, hidden),
        )
        self.k_proj, self.v_proj = (nn.Linear(hidden, self.kv_heads * self.dim) for _ in "kv")
        self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(self, x, cos, sin, mask):
        """x [B, L, H], mask bool [B, 1, 1, L, L] (true: may look)."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.dim)), cos, sin).unflatten(
            2, (self.kv_heads, -1)
        )
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.dim))
        scores = torch.einsum("blkgd,bmkd->bkglm", q, k).float() / math.sqrt(self.dim)
        scores = scores.masked_fill(~mask, float("-inf"))
        # a key without a value
        sink = self.sinks.float().view(self.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1].to(v.dtype)
        return self.o_proj(torch.einsum("bkglm,bmkd->blkgd", weights, v).flatten(2))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        e, h, i = (CONFIG[k] for k in ("num_local_experts", "hidden_size", "intermediate_size"))
        self.gate_up_proj, self.gate_up_proj_bias = (
            nn.Parameter(torch.empty(s)) for s in ((e, 2 * i, h), (e, 2 * i))
        )
        self.down_proj, self.down_proj_bias = (
            nn.Parameter(torch.empty(s)) for s in ((e, h, i), (e, h))
        )

    @staticmethod
    def swiglu(h):
        """h [..., 2I], gate and up interleaved -> [..., I]."""
        gate, up = h[..., 0::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def forward(self, x, gates, weights_4bit, activations_8bit):
        """x [T, H], gates [T, E] (0 where an expert was not chosen) -> [T, H]."""
        w1, w2, b1, b2 = (
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_bias,
            self.down_proj_bias,
        )
        w1, w2 = (through_mxfp4(w1), through_mxfp4(w2)) if weights_4bit else (w1, w2)
        seen = through_mxfp8 if activations_8bit else lambda t: t
        x = seen(x)
        if x.is_cuda:  # every expert on every token is two large GEMMs: fastest there at this size
            h = (x @ w1.flatten(0, 1).T).unflatten(-1, b1.shape) + b1  # [T, E, 2I]
            a = seen(self.swiglu(h)) * gates[..., None]
            return a.flatten(1) @ w2.transpose(1, 2).flatten(0, 1) + gates @ b2
        out = torch.zeros_like(x)
        for e in range(len(w1)):
            rows = gates[:, e].nonzero().squeeze(-1)
            y = seen(self.swiglu(F.linear(x[rows], w1[e], b1[e])))
            out = out.index_add(0, rows, gates[rows, e, None] * F.linear(y, w2[e], b2[e]))
        return out


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = (
            nn.Linear(CONFIG["hidden_size"], CONFIG["num_local_experts"]),
            Experts(),
        )

    def forward(self, x, weights_4bit, activations_8bit):
        """x [B, L, H] -> same, and the balance loss: E * sum_e share of choices(e) * mean
        probability(e)."""
        flat = x.flatten(0, 1)
        logits = self.router(flat).float()
        values, chosen = logits.topk(CONFIG["num_experts_per_tok"], dim=-1)
        gates = torch.zeros_like(logits).scatter(1, chosen, values.softmax(-1))  # [T, E]
        balance = (
            ((gates.detach() > 0).float().mean(0) * logits.softmax(-1).mean(0)).sum()
            * logits.shape[1]
            / 4
        )
        return self.experts(flat, gates, weights_4bit, activations_8bit).view_as(x), balance


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn, self.mlp = Attention(), MoE()

    def forward(self, x, cos, sin, mask, weights_4bit, activations_8bit):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        y, balance = self.mlp(self.post_attention_layernorm(x), weights_4bit, activations_8bit)
        return x + y, balance


class Model(nn.Module):
    """Parameters carry Hugging Face's names."""

    def __init__(self):
        super().__init__()
        hidden = CONFIG["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, hidden)
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model.norm = norm()
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 1 and "weight" in name:
                continue  # norm gains stay 1
            if name.endswith("bias") or p.ndim == 1:
                nn.init.zeros_(p)
            else:
                residual = 0.35 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(
                    p, std=1.0 if "embed" in name else residual / math.sqrt(p.shape[-1])
                )

    def forward(self, tokens, positions, documents, weights_4bit, activations_8bit):
        """tokens, positions, documents [B, L] -> logits [B, L, V], balance loss; positions restart
        per document."""
        at = torch.arange(tokens.shape[1], device=tokens.device)
        back = at[:, None] - at  # [L, L]
        full = (back >= 0) & (documents[:, :, None] == documents[:, None, :])  # [B, L, L]
        masks = {"full_attention": full, "sliding_attention": full & (back < WINDOW)}
        cos, sin = rope(positions)
        x, balance = self.model.embed_tokens(tokens), 0.0
        for i, layer in enumerate(self.model.layers):
            mask = masks[CONFIG["layer_types"][i]][:, None, None]
            x, more = layer(x, cos, sin, mask, weights_4bit, activations_8bit)
            balance = balance + more
        return self.lm_head(self.model.norm(x)), balance / LAYERS


# --------------------------------------------------------------------------------------- the file,
# and what it is worth


def save(model, folder):
    """Experts as mxfp4 blocks (two codes a byte, the earlier in the low nibble) and E8M0 scales,
    the rest bf16."""
    tensors = {}
    for name, p in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            grid, exponent = mxfp4(p.cpu())
            magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            codes = (torch.bucketize(grid.abs(), magnitudes) + 8 * (grid < 0)).to(torch.uint8)
            tensors[name + "_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()
            tensors[name + "_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8).contiguous()
        else:
            tensors[name] = p.cpu().bfloat16().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


EXAM = [
    *(
        (f"{kind}, {digits} digits", kind, digits)
        for kind in ("add", "subtract")
        for digits in (2, 3, 4)
    ),
    *((kind.replace("_", " "), kind, None) for kind in list(Author.KINDS)[2:]),
    ("later turn", None, None),
]
FIXED = {
    "What is 17 + 25?": "17 + 25 = 42",
    "What is the capital of France?": "The capital of France is Paris.",
}


def exam(tokenizer, each):
    """Held-out prompts, `each` of a kind, every date random -> list of (kind, user text, prompt
    tokens, answer)."""
    author, questions = Author(2, syllables(tokenizer)), []
    for title, kind, digits in EXAM + [(text, None, None) for text in FIXED]:
        for _ in range(each):
            earlier = author.rng.randint(1, 2) if title == "later turn" else 0
            how = {"digits": digits} if digits else {}
            turns, _, final, date, effort = author.conversation(kind, True, earlier, **how)
            if title in FIXED:
                turns, final = [("user", title)], [FIXED[title]]
            questions.append(
                (title, turns[-1][1], chat_tokens(tokenizer, turns, date, effort), "".join(final))
            )
    return questions


def evaluate(folder, device, each):
    """Greedy answers of the engine on the shipped file, in float32, compared with the expected
    text, exactly."""
    tokenizer, right = load_tokenizer(folder), Counter()
    questions = exam(tokenizer, each)
    model = GPTOSS.from_pretrained(folder, device, dtype=torch.float32)
    stop = [tokenizer.encode_single_token("<|return|>")]
    replies = model.generate([q[2] for q in questions], 256, stop_tokens=stop)
    for (kind, user, _, expected), reply in zip(questions, replies, strict=True):
        answer = tokenizer.decode(reply).split("final<|message|>")[-1]
        right[kind] += answer == expected
        if answer != expected:
            print(f"{kind}: {user!r}: {answer!r}, not {expected!r}", file=sys.stderr)
    print(f"| kind | right of {each} | % |\n| --- | --- | --- |")
    for kind, n in right.items():
        print(f"| {kind} | {n} | {100 * n / each:.1f} |")


def train(folder, device, minutes):
    """Phases by share of the time: plain; from 50% experts through mxfp4; from 75% every other
    batch mxfp8 too."""
    torch.manual_seed(1)
    write_tokenizer(folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder)
    model = Model().to(device)
    cuda = device == "cuda"
    rows, workers = (96, 12) if cuda else (16, 1)
    if cuda:
        for layer in model.model.layers:
            layer.compile()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=cuda,
    )
    batches = torch.utils.data.DataLoader(
        Batches(tokenizer, rows, seed=1),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8,
        pin_memory=cuda,
    )
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, {device}, {minutes} minutes, batches of {rows} x {CONTEXT} tokens",
        file=sys.stderr,
    )
    start, average, reported, saved = time.time(), None, 0.0, 0.0
    every, end = (1, "\r") if sys.stderr.isatty() else (15, "\n")
    for step, batch in enumerate(batches):
        done = (time.time() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * done))
        tokens, targets, documents = batch.to(device, non_blocking=True).long()
        at = torch.arange(CONTEXT, device=device).expand_as(tokens)
        first = torch.ones_like(tokens, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        positions = at - (at * first).cummax(1).values
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            logits, balance = model(
                tokens, positions, documents, done > 0.5, done > 0.75 and step % 2 == 1
            )
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.detach() if average is None else average.lerp(loss.detach(), 0.02)
        if time.time() - reported > every:
            reported, speed = time.time(), (step + 1) * tokens.numel() / (time.time() - start)
            print(
                f"{done:4.0%}  step {step + 1:,}  loss {average.item():.4f}  balance {balance.item():.3f}  "
                f"{speed / 1000:,.1f}k tokens/s",
                end=end,
                file=sys.stderr,
                flush=True,
            )
        if time.time() - saved > 120:
            saved = time.time()
            save(model, folder)
    save(model, folder)
    print(
        f"\n{step:,} steps, {step * rows * CONTEXT / 1e6:,.0f} million tokens, {minutes} minutes",
        file=sys.stderr,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--eval", action="store_true", help="only evaluate the file")
    parser.add_argument("--minutes", type=float, help="training time (8.2 on CUDA, 360 on a CPU)")
    parser.add_argument("--each", type=int, default=300, help="evaluation prompts of each kind")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the checkpoint")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.eval:
        train(args.out, device, args.minutes or (8.2 if device == "cuda" else 360))
    evaluate(args.out, device, args.each)


if __name__ == "__main__":
    main()
