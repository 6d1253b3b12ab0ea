// An error, in words.
#pragma once

#include <sstream>
#include <stdexcept>

namespace torch_plugins {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace torch_plugins
