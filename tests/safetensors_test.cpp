#include "data/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>

#include "configs/error.h"
#include "data/storage.h"

namespace corank {
namespace {

using Named = std::vector<std::pair<std::string, at::Tensor>>;

class Safetensors : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(path_); }
  void write(const std::string& bytes) { DiskStorage().write_file(path_, bytes); }
  /// A file with this header and so many data bytes.
  void write_raw(const std::string& header, size_t data_bytes) {
    const uint64_t length = header.size();
    write(std::string(reinterpret_cast<const char*>(&length), 8) + header + std::string(data_bytes, '\1'));
  }
  /// Must be refused with exit code 65, naming the file, and `part`.
  void expect_refused(const std::string& part) {
    try {
      const SafetensorsFile file(path_);
      ADD_FAILURE() << "accepted, expected: " << part;
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.code()), 65) << error.what();
      EXPECT_EQ(std::string(error.what()).rfind(path_, 0), 0u) << error.what();
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  void expect_refused(const std::string& header, size_t data_bytes, const std::string& part) {
    write_raw(header, data_bytes);
    expect_refused(part);
  }
  const std::string path_ = testing::TempDir() + "corank_st_" + std::to_string(getpid()) + ".safetensors";
};

Named every_type() {
  Named tensors;
  for (const auto type :
       {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kLong, at::kInt, at::kChar, at::kByte}) {
    tensors.emplace_back(std::string("t.") + c10::toString(type), at::arange(15, at::kLong).view({3, 5}).to(type));
  }
  tensors.emplace_back("bool", at::arange(5, at::kLong).remainder(2).to(at::kBool));
  tensors.emplace_back("scalar", at::full({}, 2.5f));
  tensors.emplace_back("empty", at::empty({0, 3}));
  return tensors;
}

TEST_F(Safetensors, RoundTrip) {
  write(safetensors_image(every_type(), {{"format", "pt"}, {"note", "a \"b\""}}));
  const SafetensorsFile file(path_);
  EXPECT_EQ(file.tensors().size(), every_type().size());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"note", "a \"b\""}}));
  int64_t bytes = 0;
  for (const auto& [name, tensor] : every_type()) {
    EXPECT_EQ(file.info(name).dtype, tensor.scalar_type()) << name;
    EXPECT_EQ(file.info(name).shape, tensor.sizes().vec()) << name;
    const at::Tensor read = file.read(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read, tensor)) << name;
    bytes += static_cast<int64_t>(tensor.nbytes());
  }
  EXPECT_EQ(file.bytes_read(), bytes);
  EXPECT_THROW(file.read("absent"), InputError);
}

TEST_F(Safetensors, ImageLayout) {
  const std::string image = safetensors_image({{"b", at::arange(6).view({2, 3}).t()}, {"a", at::ones({1}, at::kByte)}});
  uint64_t length = 0;
  std::memcpy(&length, image.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  EXPECT_EQ(image.size(), 8 + length + 49);
  std::string header = image.substr(8, length);
  header.erase(header.find_last_not_of(' ') + 1);
  EXPECT_EQ(header, R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I64","shape":[3,2],"data_offsets":[0,48]},)"
                    R"("a":{"dtype":"U8","shape":[1],"data_offsets":[48,49]}})");
  int64_t second = 0;
  std::memcpy(&second, image.data() + 8 + length + 8, 8);
  EXPECT_EQ(second, 3);
  EXPECT_EQ(safetensors_image({{"x", at::ones({2})}}, {}).find("__metadata__"), std::string::npos);
}

TEST_F(Safetensors, HeaderFitsAFileWrittenInPieces) {
  const Named tensors = every_type();
  std::vector<std::pair<std::string, TensorInfo>> infos;
  for (const auto& [name, tensor] : tensors) infos.push_back({name, {tensor.scalar_type(), tensor.sizes().vec()}});
  EXPECT_EQ(safetensors_image(tensors).rfind(safetensors_header(infos), 0), 0u);
}

TEST_F(Safetensors, ImageRefusesWhatCannotBeReadBack) {
  const at::Tensor x = at::ones({1});
  EXPECT_THROW(safetensors_image({{"x", x}, {"x", x}}), InternalError);
  EXPECT_THROW(safetensors_image({{"a/b", x}}), InternalError);
  EXPECT_THROW(safetensors_image({{"", x}}), InternalError);
  EXPECT_THROW(safetensors_image({{"__metadata__", x}}), InternalError);
  EXPECT_THROW(safetensors_image({{"x", x.to(at::kComplexFloat)}}), InternalError);
}

TEST_F(Safetensors, SlicesReadOnlyWhatTheyNeed) {
  const at::Tensor matrix = at::arange(7 * 10, at::kInt).view({7, 10}).to(at::kBFloat16);
  const at::Tensor cube = at::arange(3 * 4 * 5, at::kFloat).view({3, 4, 5});
  write(safetensors_image({{"odd", at::ones({3}, at::kByte)}, {"matrix", matrix}, {"cube", cube}}));
  for (const auto& [name, tensor] : Named{{"matrix", matrix}, {"cube", cube}}) {
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      for (int64_t start = 0; start <= tensor.size(dim); ++start) {
        for (int64_t length = 0; start + length <= tensor.size(dim); ++length) {
          const SafetensorsFile file(path_);
          const at::Tensor expected = tensor.narrow(dim, start, length);
          const at::Tensor slice = file.read_slice(name, dim, start, length);
          ASSERT_TRUE(at::equal(slice, expected)) << name << " " << dim << " " << start << " " << length;
          ASSERT_TRUE(slice.is_contiguous());
          ASSERT_EQ(file.bytes_read(), static_cast<int64_t>(expected.numel() * expected.element_size()));
        }
      }
    }
  }
  const SafetensorsFile file(path_);
  EXPECT_THROW(file.read_slice("matrix", 2, 0, 1), InternalError);
  EXPECT_THROW(file.read_slice("matrix", -1, 0, 1), InternalError);
  EXPECT_THROW(file.read_slice("matrix", 0, 0, 8), InternalError);
  EXPECT_THROW(file.read_slice("matrix", 0, -1, 2), InternalError);
  EXPECT_THROW(file.read_slice("matrix", 0, INT64_MAX, 2), InternalError);
  EXPECT_THROW(file.read_slice("absent", 0, 0, 1), InputError);
}

TEST_F(Safetensors, ManyThreadsRead) {
  const at::Tensor x = at::arange(100'000);
  write(safetensors_image({{"x", x}}));
  const SafetensorsFile file(path_);
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (int64_t start = 0; start < 100; ++start) {
          EXPECT_TRUE(at::equal(file.read_slice("x", 0, start, 500), x.narrow(0, start, 500)));
        }
      });
    }
  }
  EXPECT_EQ(file.bytes_read(), 4 * 100 * 500 * 8);
}

TEST_F(Safetensors, NamesAndPadding) {
  write_raw(R"({"a.B_0-x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   )", 2);
  EXPECT_EQ(SafetensorsFile(path_).read("a.B_0-x").sum().item<int64_t>(), 2);
  write_raw("{}", 0);
  EXPECT_TRUE(SafetensorsFile(path_).tensors().empty());
}

TEST_F(Safetensors, HostileLengths) {
  EXPECT_THROW(SafetensorsFile{path_}, MissingError);
  EXPECT_THROW(SafetensorsFile{testing::TempDir()}, MissingError);
  write("");
  expect_refused("shorter than");
  write("1234567");
  expect_refused("shorter than");
  for (const uint64_t length : {uint64_t{3}, uint64_t{100}, uint64_t{1} << 40, uint64_t{1} << 63, UINT64_MAX}) {
    write(std::string(reinterpret_cast<const char*>(&length), 8) + "{}");
    expect_refused("claims " + std::to_string(length));
  }
  write_raw("{}" + std::string(size_t{16} << 20, ' '), 0);
  expect_refused("at most 16777216");
  write(std::string(8, '\0'));
  expect_refused("does not begin with {");
}

TEST_F(Safetensors, HostileJson) {
  const std::string good = R"({"dtype":"U8","shape":[2],"data_offsets":[0,2]})";
  expect_refused(R"( {"a":)" + good + "}", 2, "does not begin with {");
  expect_refused("\xef\xbb\xbf{\"a\":" + good + "}", 2, "does not begin with {");
  expect_refused("[]", 0, "does not begin with {");
  expect_refused(R"({"a":)" + good, 2, "not valid JSON");
  expect_refused(R"({"a":)" + good + "}x", 2, "not valid JSON");
  expect_refused(R"({"a":)" + good + "}" + std::string(1, '\0'), 2, "not valid JSON");
  expect_refused(R"({"a":)" + good + "} {}", 2, "not valid JSON");
  expect_refused("{\"\xff\":" + good + "}", 2, "not valid JSON");
  expect_refused("{\"\xc0\xaf\":" + good + "}", 2, "not valid JSON");
  expect_refused(R"({"a":)" + good + R"(,"a":)" + good + "}", 2, "stands twice");
  expect_refused(R"({"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2, "stands twice");
  expect_refused(R"({"__metadata__":{"a":"x","a":"y"},"a":)" + good + "}", 2, "stands twice");
  expect_refused(R"({"__metadata__":{"a":1},"a":)" + good + "}", 2, "__metadata__");
  expect_refused(R"({"__metadata__":"x","a":)" + good + "}", 2, "__metadata__");
  expect_refused(R"({"a":[[[[[[1]]]]]]})", 2, "nested deeper");
  expect_refused("{\"a\":" + std::string(1'000'000, '['), 2, "nested deeper");
}

TEST_F(Safetensors, HostileEntries) {
  const auto entry = [](const std::string& body) { return R"({"a":{)" + body + "}}"; };
  expect_refused(R"({"a":3})", 2, "exactly dtype, shape and data_offsets");
  expect_refused(entry(R"("dtype":"U8","shape":[2])"), 2, "exactly dtype");
  expect_refused(entry(R"("dtype":"U8","shape":[2],"data_offsets":[0,2],"more":1)"), 2, "exactly dtype");
  for (const char* type : {R"("F8_E4M3")", R"("f32")", R"("")", "8", "null"}) {
    expect_refused(entry(std::string(R"("dtype":)") + type + R"(,"shape":[2],"data_offsets":[0,2])"), 2,
                   "is not one of F64, F32, BF16, F16, I64, I32, I8, U8, BOOL");
  }
  for (const char* shape : {"[-2]", "[2.0]", "[2e0]", "[\"2\"]", "[18446744073709551616]", "[9223372036854775808]",
                            "[null]", "[[2]]", "[true]", "[-0]"}) {
    expect_refused(entry(std::string(R"("dtype":"U8","shape":)") + shape + R"(,"data_offsets":[0,2])"), 2,
                   "no whole number");
  }
  expect_refused(entry(R"("dtype":"U8","shape":2,"data_offsets":[0,2])"), 2, "is not a list");
  expect_refused(entry(R"("dtype":"U8","shape":[02],"data_offsets":[0,2])"), 2, "not valid JSON");
  expect_refused(entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,2])"), 2, "8 dimensions");
  expect_refused(entry(R"("dtype":"U8","shape":[3],"data_offsets":[0,2])"), 2, "does not take 2 bytes");
  expect_refused(entry(R"("dtype":"U8","shape":[],"data_offsets":[0,2])"), 2, "does not take 2 bytes");
  expect_refused(entry(R"("dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0, "does not take");
  expect_refused(entry(R"("dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0])"), 0, "does not take");
  expect_refused(entry(R"("dtype":"F64","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"), 0, "does not take");
  for (const char* offsets : {"[0]", "[0,2,2]", "[2,0]", "[0,3]", "[]"}) {
    expect_refused(entry(std::string(R"("dtype":"U8","shape":[2],"data_offsets":)") + offsets), 2, "do not lie within");
  }
  expect_refused(entry(R"("dtype":"U8","shape":[2],"data_offsets":[-2,0])"), 2, "no whole number");
  for (const std::string& name : {std::string(), std::string("a/b"), std::string("../x"), std::string("a b"),
                                  std::string("a\\u0000b"), std::string("\xc3\xa4"), std::string(513, 'x')}) {
    expect_refused("{\"" + name + R"(":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2, "has the name");
  }
}

TEST_F(Safetensors, HostileLayouts) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + first +
           R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + second + "}}";
  };
  expect_refused(two("[0,2]", "[1,3]"), 3, "the one before it ends at 2");
  expect_refused(two("[0,2]", "[0,2]"), 2, "the one before it ends at 2");
  expect_refused(two("[0,2]", "[3,5]"), 5, "the one before it ends at 2");
  expect_refused(two("[1,3]", "[3,5]"), 5, "the one before it ends at 0");
  expect_refused(two("[0,2]", "[2,4]"), 5, "the file has 5");
  expect_refused(two("[0,2]", "[2,4]"), 3, "do not lie within");
  expect_refused("{}", 1, "the file has 1");
  write_raw(two("[2,4]", "[0,2]"), 4);
  EXPECT_EQ(SafetensorsFile(path_).tensors().size(), 2u);
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  const std::string image = safetensors_image({{"a", at::ones({3})}, {"b", at::ones({2}, at::kByte)}});
  for (size_t size = 0; size < image.size(); ++size) {
    write(image.substr(0, size));
    expect_refused("");
  }
}

TEST_F(Safetensors, FileThatShrinksWhileItIsOpen) {
  write(safetensors_image({{"a", at::ones({1000})}}));
  const SafetensorsFile file(path_);
  std::filesystem::resize_file(path_, 1000);
  EXPECT_THROW(file.read("a"), InputError);
}

TEST_F(Safetensors, HeaderBombOfManyTensorsIsRefused) {
  std::string header = "{";
  for (int i = 0; i <= 200'000; ++i) {
    header += (i ? ",\"" : "\"") + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  expect_refused(header + "}", 0, "more than 200000 tensors");
}

}  // namespace
}  // namespace corank
