#pragma once
#include <string>
#include <string_view>

namespace corank {

/// Length of the UTF-8 sequence at `at`, 0 if there is none (RFC 3629: no overlong forms, no surrogates).
size_t utf8_length(const std::string& text, size_t at);
bool is_utf8(const std::string& text);

/// Control characters, marks that turn the direction of writing and bytes that are no UTF-8 as \n, \x1b, \u202e; a
/// backslash before each character of `marks`.
std::string escaped(const std::string& text, std::string_view marks = "");

/// Text of a stranger on one line that a terminal only shows and never obeys; of more than `most` bytes the middle is
/// left out.
std::string printable(const std::string& text, size_t most = 4096);
/// The same of each line.
std::string printable_lines(const std::string& text);

}  // namespace corank
