// Enough of JSON to read the table of an exported model.
#pragma once
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Json {
  enum Kind { Null, Number, String, List, Object } kind = Null;
  double number = 0;
  std::string string;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& operator[](const char* key) const { return object.at(key); }
  long integer() const { return static_cast<long>(number); }
  std::vector<long> integers() const {
    std::vector<long> found;
    for (const Json& item : list) found.push_back(item.integer());
    return found;
  }

  static Json parse(const std::string& text) {
    const char* at = text.c_str();
    return value(at);
  }

 private:
  static bool taken(const char*& at, char wanted) {
    while (*at == ' ' || *at == '\n') ++at;
    return *at == wanted ? ++at, true : false;
  }

  static std::string text(const char*& at) {
    std::string found;
    for (; *at && *at != '"'; ++at) found += *at == '\\' ? *++at : *at;  // no name of ours has other escapes
    ++at;
    return found;
  }

  static Json value(const char*& at) {
    Json made;
    if (taken(at, '"')) {
      made.kind = String, made.string = text(at);
    } else if (taken(at, '[')) {
      made.kind = List;
      while (!taken(at, ']')) made.list.push_back(value(at)), taken(at, ',');
    } else if (taken(at, '{')) {
      made.kind = Object;
      while (!taken(at, '}')) {
        if (!taken(at, '"')) throw std::runtime_error("no JSON");
        std::string key = text(at);
        taken(at, ':');
        made.object.emplace(key, value(at));
        taken(at, ',');
      }
    } else if (*at == 't' || *at == 'f' || *at == 'n') {
      made.kind = *at == 'n' ? Null : Number, made.number = *at == 't';
      at += *at == 'f' ? 5 : 4;
    } else {
      char* end = nullptr;
      made.kind = Number, made.number = std::strtod(at, &end);
      if (std::exchange(at, end) == end) throw std::runtime_error("no JSON");
    }
    return made;
  }
};
