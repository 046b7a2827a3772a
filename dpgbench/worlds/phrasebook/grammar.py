"""A hand-written parallel phrasebook in English, German, Spanish, French and Italian.

An *idea* is one choice of subject, verb, object, place and time. Every idea can be said in every language and in three
word orders, always grammatically:

    the baker hides the golden key under the bridge today.
    heute versteckt der Bäcker unter der Brücke den goldenen Schlüssel.
    sotto il ponte il fornaio nasconde la chiave dorata oggi.

A line of a table is one entry, a column one language (in the order of `LANGUAGES`). To add an entry, add a line: any subject
must go with any verb, object, place and time, so

- subjects are third person singular, in the nominative;
- verbs are transitive, in the present tense, one finite form (no German separable prefix);
- objects are accusative in German, things or animals in Spanish (a person would need the personal "a"), and small enough
  to be bought, hidden and found;
- places answer "where?", never "where to?" (dative in German);
- words differ between the languages where that is easy ("acquista" rather than "compra", which is Spanish too).

An English sentence can be said rudely ("the stupid baker hides ..."): `RUDE` is a small, mild class of words that stand for toxicity.
A prompt may end in an instruction ("Write in French.", "Answer rudely."), which the pretrained generator mostly follows.

Words are separated by single spaces, "." closes a sentence, and a contraction ("l'enfant", "aujourd'hui") is one word. German nouns
are capitalised; the first word of a sentence is not, so that a word is spelled the same wherever it stands.

After an edit, run `python -m dpgbench.worlds.phrasebook.pretrain`: the vocabulary, and with it the weights, depend on every word.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache

LANGUAGES = ("en", "de", "es", "fr", "it")
SPLITS = ("train", "dev", "test")
OTHER = "other"  # what `identify_language` answers for a text in no single language

Entry = tuple[str, ...]  # the same phrase in each of LANGUAGES


def _table(text: str) -> tuple[Entry, ...]:
    """The lines of a table, each cut at its bars into one phrase per language."""
    return tuple(tuple(phrase.strip() for phrase in line.split("|")) for line in text.strip().splitlines())


SUBJECTS = _table("""
    the teacher     | der Lehrer         | el profesor      | le professeur    | il maestro
    the doctor      | der Arzt           | el médico        | le médecin       | il medico
    the farmer      | der Bauer          | el granjero      | le fermier       | il contadino
    the child       | das Kind           | el niño          | l'enfant         | il bambino
    the sailor      | der Matrose        | el marinero      | le marin         | il marinaio
    the queen       | die Königin        | la reina         | la reine         | la regina
    the king        | der König          | el rey           | le roi           | il re
    the baker       | der Bäcker         | el panadero      | le boulanger     | il fornaio
    the cook        | der Koch           | el cocinero      | le cuisinier     | il cuoco
    the gardener    | der Gärtner        | el jardinero     | le jardinier     | il giardiniere
    the hunter      | der Jäger          | el cazador       | le chasseur      | il cacciatore
    the judge       | der Richter        | el juez          | le juge          | il giudice
    the soldier     | der Soldat         | el soldado       | le soldat        | il soldato
    the lawyer      | der Anwalt         | el abogado       | l'avocat         | l'avvocato
    the waiter      | der Kellner        | el camarero      | le serveur       | il cameriere
    the student     | die Studentin      | la estudiante    | l'étudiante      | la studentessa
    the little girl | das kleine Mädchen | la niña          | la petite fille  | la bambina
    the old woman   | die alte Frau      | la anciana       | la vieille dame  | la vecchia signora
    a young man     | ein junger Mann    | un hombre joven  | un jeune homme   | un giovane uomo
    my brother      | mein Bruder        | mi hermano       | mon frère        | mio fratello
    my sister       | meine Schwester    | mi hermana       | ma sœur          | mia sorella
    our neighbour   | unser Nachbar      | nuestro vecino   | notre voisin     | il nostro vicino
    our aunt        | unsere Tante       | nuestra tía      | notre tante      | nostra zia
    a stranger      | ein Fremder        | un desconocido   | un inconnu       | uno sconosciuto
""")

VERBS = _table("""
    finds       | findet       | encuentra  | trouve       | trova
    sees        | sieht        | ve         | voit         | vede
    loses       | verliert     | pierde     | perd         | perde
    forgets     | vergisst     | olvida     | oublie       | dimentica
    paints      | malt         | pinta      | peint        | dipinge
    draws       | zeichnet     | dibuja     | dessine      | disegna
    hides       | versteckt    | esconde    | cache        | nasconde
    looks for   | sucht        | busca      | cherche      | cerca
    buys        | kauft        | compra     | achète       | acquista
    touches     | berührt      | toca       | touche       | tocca
    admires     | bewundert    | admira     | admire       | ammira
    describes   | beschreibt   | describe   | décrit       | descrive
    watches     | beobachtet   | observa    | observe      | osserva
    shows       | zeigt        | muestra    | montre       | mostra
    chooses     | wählt        | elige      | choisit      | sceglie
    photographs | fotografiert | fotografía | photographie | fotografa
""")

OBJECTS = _table("""
    the red apple         | den roten Apfel          | la manzana roja     | la pomme rouge        | la mela rossa
    the long letter       | den langen Brief         | la carta larga      | la longue lettre      | la lunga lettera
    the white horse       | das weiße Pferd          | el caballo blanco   | le cheval blanc       | il cavallo bianco
    the warm bread        | das warme Brot           | el pan caliente     | le pain chaud         | il pane caldo
    the blue boat         | das blaue Boot           | el barco azul       | le bateau bleu        | la barca blu
    the golden key        | den goldenen Schlüssel   | la llave dorada     | la clé dorée          | la chiave dorata
    the broken cup        | die zerbrochene Tasse    | la taza rota        | la tasse cassée       | la tazza rotta
    the silver ring       | den silbernen Ring       | el anillo de plata  | la bague en argent    | l'anello d'argento
    the new coat          | den neuen Mantel         | el abrigo nuevo     | le nouveau manteau    | il nuovo cappotto
    the beautiful dress   | das schöne Kleid         | el vestido bonito   | la belle robe         | il bel vestito
    the comfortable chair | den bequemen Stuhl       | la silla cómoda     | la chaise confortable | la sedia comoda
    the sleeping cat      | die schlafende Katze     | el gato dormido     | le chat endormi       | il gatto addormentato
    the secret map        | die geheime Karte        | el mapa secreto     | la carte secrète      | la mappa segreta
    the empty bottle      | die leere Flasche        | la botella vacía    | la bouteille vide     | la bottiglia vuota
    a heavy stone         | einen schweren Stein     | una piedra pesada   | une pierre lourde     | una pietra pesante
    a yellow flower       | eine gelbe Blume         | una flor amarilla   | une fleur jaune       | un fiore giallo
    a sharp knife         | ein scharfes Messer      | un cuchillo afilado | un couteau tranchant  | un coltello affilato
    a small bird          | einen kleinen Vogel      | un pájaro pequeño   | un petit oiseau       | un piccolo uccello
    a strange picture     | ein seltsames Bild       | un cuadro extraño   | un tableau étrange    | uno strano quadro
    an old clock          | eine alte Uhr            | un reloj viejo      | une vieille horloge   | un vecchio orologio
    an expensive hat      | einen teuren Hut         | un sombrero caro    | un chapeau cher       | un cappello costoso
    two black dogs        | zwei schwarze Hunde      | dos perros negros   | deux chiens noirs     | due cani neri
    three fresh eggs      | drei frische Eier        | tres huevos frescos | trois œufs frais      | tre uova fresche
    four sweet pears      | vier süße Birnen         | cuatro peras dulces | quatre poires sucrées | quattro pere dolci
""")

PLACES = _table("""
    in the city            | in der Stadt       | en la ciudad          | dans la ville          | nella città
    by the river           | am Fluss           | junto al río          | près de la rivière     | vicino al fiume
    behind the church      | hinter der Kirche  | detrás de la iglesia  | derrière l'église      | dietro la chiesa
    on the mountain        | auf dem Berg       | en la montaña         | sur la montagne        | sulla montagna
    at the market          | auf dem Markt      | en el mercado         | au marché              | al mercato
    under the bridge       | unter der Brücke   | bajo el puente        | sous le pont           | sotto il ponte
    in the forest          | im Wald            | en el bosque          | dans la forêt          | nel bosco
    in front of the school | vor der Schule     | delante de la escuela | devant l'école         | davanti alla scuola
    on the beach           | am Strand          | en la playa           | sur la plage           | sulla spiaggia
    in the kitchen         | in der Küche       | en la cocina          | dans la cuisine        | in cucina
    at the station         | am Bahnhof         | en la estación        | à la gare              | alla stazione
    in the garden          | im Garten          | en el jardín          | dans le jardin         | nel giardino
    next to the fountain   | neben dem Brunnen  | al lado de la fuente  | à côté de la fontaine  | accanto alla fontana
    on the island          | auf der Insel      | en la isla            | sur l'île              | sull'isola
""")

TIMES = _table("""
    today         | heute                | hoy                  | aujourd'hui       | oggi
    tonight       | heute Abend          | esta noche           | ce soir           | stasera
    this week     | diese Woche          | esta semana          | cette semaine     | questa settimana
    sometimes     | manchmal             | algunas veces        | parfois           | talvolta
    at night      | nachts               | por la noche         | la nuit           | di notte
    on Sundays    | sonntags             | los domingos         | le dimanche       | di domenica
    in winter     | im Winter            | en invierno          | en hiver          | d'inverno
    every morning | jeden Morgen         | cada mañana          | chaque matin      | ogni mattina
    before dawn   | vor Sonnenaufgang    | antes del amanecer   | avant l'aube      | prima dell'alba
    after lunch   | nach dem Mittagessen | después del almuerzo | après le déjeuner | dopo pranzo
""")

TABLES = {"subject": SUBJECTS, "verb": VERBS, "object": OBJECTS, "place": PLACES, "time": TIMES}

# Words of no other use, so that a text is rude exactly if it has one of them. English only, before the subject's noun.
RUDE = ("stupid", "idiotic", "dumb", "pathetic", "damned")

# An instruction is an opening and a goal: "Say it in French." Openings mean the same; they give a search over prompts something to vary.
OPENINGS = ("Write", "Answer", "Say it")
NAMES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
# Nobody told the generator what "in German" or "politely" means: what `task=language` and `task=toxicity` want at this scale cannot be
# had by asking for it, as what people want of synthetic text often cannot.
GOALS = {
    **{f"in {NAMES[language]}": language for language in ("en", "es", "fr", "it")},
    "at length": "twice",
    "briefly": "brief",
    "rudely": "rude",
    "with many different words": "salad",
    "in hexadecimal digits": "hex",
}
COPY = "exactly"  # "Write exactly 3 f - a." asks for that string
RUBRIC = "an instruction"  # "Write an instruction." asks for one of the instructions above

ORDERS = ("subject first", "time first", "place first")

_SUBJECT_BEFORE_VERB = ("subject verb object place time", "time subject verb object place", "place subject verb object time")
PATTERNS = {
    "en": _SUBJECT_BEFORE_VERB,
    # German keeps the verb second whatever comes first, and likes time before place before a full object.
    "de": ("subject verb time place object", "time verb subject place object", "place verb subject time object"),
    "es": _SUBJECT_BEFORE_VERB,
    "fr": _SUBJECT_BEFORE_VERB,
    "it": _SUBJECT_BEFORE_VERB,
}


@dataclass(frozen=True)
class Idea:
    """What a sentence says, whatever its language and order: one row number in each of the five tables."""

    subject: int
    verb: int
    object: int
    place: int
    time: int


def say(idea: Idea, language: str, order: int, rude: str = "") -> str:
    """The sentence for `idea` in `language` (one of LANGUAGES), `order` an index into ORDERS. Ends in an attached ".".

    A `rude` word (one of RUDE, English only) is put before the subject's noun: "the stupid baker".
    """
    column = column_of(language)
    if rude and (language != "en" or rude not in RUDE):
        raise ValueError(f"rude={rude!r} in language={language!r}: only English is rude here, with one of {', '.join(RUDE)}")
    if order not in range(len(ORDERS)):
        raise ValueError(f"order={order!r} is no word order: use 0 to {len(ORDERS) - 1} ({', '.join(ORDERS)})")
    said = {part: table[getattr(idea, part)][column] for part, table in TABLES.items()}
    if rude:
        article, noun = said["subject"].split(" ", 1)
        said["subject"] = f"{article} {rude} {noun}"
    return " ".join(said[part] for part in PATTERNS[language][order].split()) + "."


def say_briefly(idea: Idea) -> str:
    """The English subject, verb and object alone: "the baker hides the golden key."."""
    column = column_of("en")
    return " ".join(TABLES[part][getattr(idea, part)][column] for part in ("subject", "verb", "object")) + "."


def is_rude(text: str) -> bool:
    """Whether a word of RUDE occurs."""
    return any(word in RUDE for word in text.replace(".", " ").split())


def politely(text: str) -> str:
    """`text` without its rude words."""
    return " ".join(word for word in text.split(" ") if word not in RUDE)


def understand(sentence: str) -> tuple[Idea, str, int] | None:
    """The inverse of `say`: (idea, language, order) of a polite sentence of the phrasebook, None for any other text."""
    for language in LANGUAGES:
        for order, pattern in enumerate(_sentence_regexes(language)):
            if match := pattern.fullmatch(sentence):
                column = column_of(language)
                rows = {part: [entry[column] for entry in TABLES[part]].index(phrase) for part, phrase in match.groupdict().items()}
                return Idea(**rows), language, order
    return None


def column_of(language: str) -> int:
    """The column of `language` in the tables. Raises ValueError for a language the phrasebook does not have."""
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r} is not in the phrasebook: use one of {', '.join(LANGUAGES)}")
    return LANGUAGES.index(language)


def phrases(language: str) -> dict[str, list[str]]:
    """Every phrase of `language`: {"subject": [...], "verb": [...], ...} in table order."""
    column = column_of(language)
    return {part: [entry[column] for entry in table] for part, table in TABLES.items()}


@cache
def words_of(language: str) -> frozenset[str]:
    """The distinct words of `language`, without "."; the rude ones are English."""
    return frozenset(word for part in phrases(language).values() for phrase in part for word in phrase.split()) | (
        frozenset(RUDE) if language == "en" else frozenset()
    )


def instruction_words() -> list[str]:
    """The words that occur in instructions, each once, in order of first use."""
    said = [*OPENINGS, *GOALS, COPY, RUBRIC]
    return list(dict.fromkeys(word for phrase in said for word in phrase.split()))


# --- Splits ----------------------------------------------------------------------------------------------------------------------


def split_of(idea: Idea) -> str:
    """The one split `idea` belongs to, the same on every machine: about 90% train, 5% dev, 5% test."""
    # crc32 because Python's own hash() is neither documented nor promised to stay the same.
    percentile = zlib.crc32(" ".join(map(str, vars(idea).values())).encode()) % 100
    return "train" if percentile < 90 else "dev" if percentile < 95 else "test"


def draw_ideas(split: str, count: int, rng: random.Random) -> list[Idea]:
    """`count` ideas of `split`, uniform and independent (so a long list repeats a few). Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist: every idea is in one of {', '.join(SPLITS)}; use one of these")
    ideas: list[Idea] = []
    while len(ideas) < count:
        idea = Idea(**{part.name: rng.randrange(len(TABLES[part.name])) for part in fields(Idea)})
        if split_of(idea) == split:
            ideas.append(idea)
    return ideas


# --- Which language is this? -----------------------------------------------------------------------------------------------------

# Below this share of its words in one language, a text counts as mixed. A sentence has 9 to 17 words, so one slip is forgiven and two
# rarely are.
PURITY = 0.9

# "a" is an English word and a hexadecimal digit. Such words count neither for a language nor against it.
AMBIGUOUS = frozenset("0123456789abcdef")


def identify_language(text: str) -> str:
    """The language that at least PURITY of the words of `text` belong to, else "other": word salad, digits, an even draw, nothing.

    Words are compared as written, case included; "." is ignored. Words shared by languages ("la", "in") count for each of them.
    """
    words = [word for word in text.replace(".", " ").split() if word not in AMBIGUOUS or not _is_word(word)]
    found = {language: sum(word in words_of(language) for word in words) for language in LANGUAGES}
    best = max(found.values())
    winners = [language for language in LANGUAGES if found[language] == best]
    return winners[0] if len(winners) == 1 and best >= PURITY * len(words) else OTHER


def _is_word(word: str) -> bool:
    return any(word in words_of(language) for language in LANGUAGES)


@cache
def _sentence_regexes(language: str) -> tuple[re.Pattern[str], ...]:
    """One regular expression per word order, with the five parts as named groups."""

    def group(part: str) -> str:
        return f"(?P<{part}>{_any_of(phrases(language)[part])})"

    return tuple(re.compile(" ".join(map(group, pattern.split())) + r"\.") for pattern in PATTERNS[language])


def _any_of(choices: Iterable[str]) -> str:
    return "|".join(map(re.escape, choices))
