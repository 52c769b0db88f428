#include "data/h5.h"

#include <gtest/gtest.h>
#include <hdf5.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "configs/error.h"
#include "data/storage.h"

/// HDF5 1.10 leaks when it refuses a damaged file, which these tests make it do thousands of times.
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5"; }

namespace corank::h5 {
namespace {

std::string temporary(const std::string& name) {
  return testing::TempDir() + "corank_h5_" + std::to_string(getpid()) + "_" + name;
}

using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

Tensors samples() {
  return {{"tokens", at::arange(-3, 7, at::kInt)},
          {"offsets", at::arange(5, at::kLong) * (int64_t{1} << 40)},
          {"mask", at::arange(256, at::kByte)},
          {"layers/0/a", at::arange(12, at::kFloat).view({3, 4}) / 7},
          {"layers/0/b", at::arange(24, at::kDouble).view({2, 3, 4}) / 7},
          {"layers/step", at::full({}, 7, at::kLong)},
          {"layers/empty", at::empty({0, 4}, at::kFloat)}};
}

std::string image_of(const Tensors& tensors) {
  Writer writer;
  for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
  writer.attribute("format", "corank-test");
  writer.attribute("nothing", "");
  writer.attribute("version", -5);
  return writer.finish();
}

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const InputError& error) {
    EXPECT_EQ(error.code(), ExitCode::data);
    return error.what();
  }
  ADD_FAILURE() << "no InputError";
  return "";
}

void expect_same(const Reader& reader, const Tensors& tensors) {
  for (const auto& [name, tensor] : tensors) {
    EXPECT_TRUE(reader.has(name)) << name;
    EXPECT_EQ(reader.dtype(name), tensor.scalar_type()) << name;
    EXPECT_EQ(reader.shape(name), tensor.sizes().vec()) << name;
    EXPECT_TRUE(at::equal(reader.read(name), tensor)) << name;
  }
}

TEST(H5, RoundTripInMemoryAndOnDisk) {
  const std::string image = image_of(samples());
  const std::string path = temporary("roundtrip.h5");
  DiskStorage().write_file(path, image);
  const Reader from_memory(image, "image");
  const Reader from_disk(path);
  for (const Reader* reader : {&from_memory, &from_disk}) {
    expect_same(*reader, samples());
    EXPECT_EQ(reader->names(), (std::vector<std::string>{"layers/0/a", "layers/0/b", "layers/empty", "layers/step",
                                                         "mask", "offsets", "tokens"}));
    EXPECT_EQ(reader->names("layers/0"), (std::vector<std::string>{"layers/0/a", "layers/0/b"}));
    EXPECT_FALSE(reader->has("layers/1/a"));
    EXPECT_EQ(reader->attribute_string("format"), "corank-test");
    EXPECT_EQ(reader->attribute_string("nothing"), "");
    EXPECT_EQ(reader->attribute_int("version"), -5);
    EXPECT_TRUE(reader->has_attribute("version"));
    EXPECT_FALSE(reader->has_attribute("absent"));
  }
  EXPECT_EQ(from_disk.origin(), path);
  std::filesystem::remove(path);
}

TEST(H5, Ranges) {
  const Reader reader(image_of(samples()), "image");
  const at::Tensor tokens = samples()[0].second;
  EXPECT_TRUE(at::equal(reader.read_range("tokens", 2, 5), tokens.narrow(0, 2, 3)));
  EXPECT_TRUE(at::equal(reader.read_range("tokens", 0, 10), tokens));
  EXPECT_EQ(reader.read_range("tokens", 4, 4).numel(), 0);
  EXPECT_THROW(reader.read_range("tokens", 4, 11), InternalError);
  EXPECT_THROW(reader.read_range("tokens", -1, 3), InternalError);
  EXPECT_THROW(reader.read_range("layers/0/a", 0, 1), InternalError);
}

TEST(H5, ManyChunksAndManyNames) {
  Tensors tensors;
  tensors.emplace_back("large", at::arange(3'000'000, at::kInt));
  tensors.emplace_back("wide", at::arange(3 * 1'500'000, at::kFloat).view({3, 1'500'000}));
  for (int i = 0; i < 300; ++i) tensors.emplace_back("group/name" + std::to_string(i), at::full({3}, i, at::kLong));
  const std::string image = image_of(tensors);
  EXPECT_LT(image.size(), 31'000'000u);
  const Reader reader(image, "image");
  expect_same(reader, tensors);
  EXPECT_EQ(reader.names().size(), tensors.size());
  EXPECT_TRUE(at::equal(reader.read_range("large", 1'048'570, 2'100'000), at::arange(1'048'570, 2'100'000, at::kInt)));
}

TEST(H5, LongAttributes) {
  Writer writer;
  const std::string text(100'000, 'x');
  writer.attribute("long", text);
  for (int i = 0; i < 20; ++i) writer.attribute("a" + std::to_string(i), i);
  const Reader reader(writer.finish(), "image");
  EXPECT_EQ(reader.attribute_string("long"), text);
  EXPECT_EQ(reader.attribute_int("a19"), 19);
}

TEST(H5, EqualContentsGiveEqualBytes) {
  const std::string first = image_of(samples());
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // HDF5 keeps times in seconds
  EXPECT_EQ(image_of(samples()), first);
  Tensors large{{"large", at::arange(1'500'001, at::kFloat)}};
  EXPECT_EQ(image_of(large), image_of(large));
}

TEST(H5, FilesOpenAtTheSameTimeAreNotMixedUp) {
  const Tensors ones{{"x", at::ones({4})}}, twos{{"x", at::full({4}, 2.0f)}};
  const Reader first(image_of(ones), "same");
  Writer writer;
  const Reader second(image_of(twos), "same");
  Reader moved(Reader(image_of(ones), "same"));
  writer.write("x", at::zeros({4}));
  expect_same(first, ones);
  expect_same(second, twos);
  expect_same(moved, ones);
  expect_same(Reader(writer.finish(), "same"), {{"x", at::zeros({4})}});
}

TEST(H5, ManyThreads) {
  const std::string image = image_of(samples());
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        expect_same(Reader(image, "image"), samples());
        EXPECT_EQ(image_of(samples()), image);
      }
    });
  }
}

/// True if every part of the file reads as it was written.
bool reads_the_same(const std::string& image, const Tensors& tensors) {
  const Reader reader(image, "flipped");
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) names.push_back(name);
  std::sort(names.begin(), names.end());
  if (reader.names() != names) return false;
  for (const auto& [name, tensor] : tensors) {
    if (reader.dtype(name) != tensor.scalar_type() || !at::equal(reader.read(name), tensor)) return false;
  }
  return reader.attribute_string("format") == "corank-test" && reader.attribute_int("version") == -5;
}

TEST(H5, EveryFlippedBitIsNoticedOrHarmless) {
  const Tensors tensors{{"a/x", at::arange(5, at::kFloat)}, {"y", at::full({}, 3, at::kLong)}};
  std::string image = image_of(tensors);
  ASSERT_TRUE(reads_the_same(image, tensors));
  int noticed = 0;
  for (size_t bit = 0; bit < 8 * image.size(); ++bit) {
    image[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    try {
      EXPECT_TRUE(reads_the_same(image, tensors)) << "bit " << bit << " gave other data without an error";
    } catch (const InputError&) {
      ++noticed;
    }
    image[bit / 8] ^= static_cast<char>(1 << (bit % 8));
  }
  EXPECT_GT(noticed, 1000);
}

TEST(H5, FlippedBitsInAFileOfManyChunksAndNames) {
  Tensors tensors{{"large", at::arange(1'100'000, at::kInt)}};
  for (int i = 0; i < 20; ++i) tensors.emplace_back("g/name" + std::to_string(i), at::full({40}, i, at::kInt));
  std::string image = image_of(tensors);
  ASSERT_TRUE(reads_the_same(image, tensors));
  const size_t total = 8 * image.size();
  for (size_t i = 0; i < 200; ++i) {
    const size_t bit = i % 2 ? total / 200 * i : total - 8 * 37 * i - 3;  // the data, and densely what follows it
    image[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    try {
      EXPECT_TRUE(reads_the_same(image, tensors)) << "bit " << bit;
    } catch (const InputError&) {
    }
    image[bit / 8] ^= static_cast<char>(1 << (bit % 8));
  }
}

TEST(H5, TruncatedFilesAreRefused) {
  const std::string image = image_of(samples());
  for (size_t size = 0; size < image.size(); size += 97) {
    EXPECT_THROW(reads_the_same(image.substr(0, size), samples()), InputError) << size;
  }
}

TEST(H5, MessagesNameFileDatasetAndCause) {
  EXPECT_THROW(Reader(temporary("absent.h5")), MissingError);
  std::string image = image_of({{"x", at::full({1000}, 1.25f)}});
  EXPECT_NE(refusal([&] { Reader(image, "some.h5").read("nowhere/x"); }).find("some.h5: has no nowhere/x"),
            std::string::npos);
  EXPECT_NE(refusal([&] { Reader(image, "some.h5").attribute_string("none"); }).find("has no attribute none"),
            std::string::npos);
  EXPECT_NE(refusal([&] { Reader(image, "some.h5").attribute_string("version"); }).find("not a string"),
            std::string::npos);
  EXPECT_NE(refusal([&] { Reader(image, "some.h5").attribute_int("format"); }).find("not an integer"),
            std::string::npos);
  EXPECT_NE(refusal([] { Reader("no hdf5 at all", "some.h5"); }).find("not a sound HDF5 file (HDF5: "),
            std::string::npos);
  EXPECT_THROW(Reader("", "some.h5"), InputError);
  const float value = 1.25f;
  image[image.find(std::string(reinterpret_cast<const char*>(&value), sizeof(value)))] ^= 1;
  EXPECT_NE(refusal([&] { Reader(image, "some.h5").read("x"); }).find("some.h5: x cannot be read (HDF5: "),
            std::string::npos);
}

TEST(H5, WriterRefusesWhatItCannotStore) {
  Writer writer;
  EXPECT_THROW(writer.write("half", at::zeros({2}, at::kHalf)), InternalError);
  EXPECT_THROW(writer.write("strided", at::zeros({2, 3}).t()), InternalError);
  EXPECT_THROW(writer.attribute("nul", std::string("a\0b", 3)), InternalError);
  writer.write("x", at::zeros({2}));
  EXPECT_THROW(writer.write("x", at::zeros({2})), InternalError);
  EXPECT_THROW(writer.write("x/y", at::zeros({2})), InternalError);
}

TEST(H5, WriterDroppedWithoutFinish) {
  Writer writer;
  writer.write("x", at::zeros({2}));
}

/// A file made with HDF5's own calls, as a stranger would.
class Foreign : public testing::Test {
 protected:
  void SetUp() override {
    file_ = H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    space_ = H5Screate_simple(1, size_, nullptr);
    create_ = H5Pcreate(H5P_DATASET_CREATE);
  }
  void TearDown() override { std::filesystem::remove(path_); }
  void add(const char* name, hid_t type, const void* data) {
    const hid_t id = H5Dcreate2(file_, name, type, space_, H5P_DEFAULT, create_, H5P_DEFAULT);
    if (data) H5Dwrite(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
    H5Dclose(id);
  }
  Reader reopen() {
    H5Pclose(create_);
    H5Sclose(space_);
    H5Fclose(file_);
    return Reader(path_);
  }
  void expect_refused(const std::string& name, const std::string& part) {
    const Reader reader = reopen();
    const std::string message = refusal([&] { reader.read(name); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }

  const std::string path_ = temporary("foreign.h5");
  const hsize_t size_[1] = {1000};
  const std::vector<double> values_ = std::vector<double>(1000, 1.5);
  hid_t file_ = -1, space_ = -1, create_ = -1;
};

TEST_F(Foreign, ContiguousWithoutChecksumIsRead) {
  add("x", H5T_IEEE_F64LE, values_.data());
  EXPECT_TRUE(at::equal(reopen().read("x"), at::full({1000}, 1.5, at::kDouble)));
}

TEST_F(Foreign, SoftLink) {
  add("x", H5T_IEEE_F64LE, values_.data());
  H5Lcreate_soft("/x", file_, "soft", H5P_DEFAULT, H5P_DEFAULT);
  const Reader reader = reopen();
  EXPECT_NE(refusal([&] { reader.read("soft"); }).find("link"), std::string::npos);
  EXPECT_NE(refusal([&] { reader.has("soft"); }).find("link"), std::string::npos);
  EXPECT_NE(refusal([&] { reader.names(); }).find("link"), std::string::npos);
}

TEST_F(Foreign, ExternalLink) {
  H5Lcreate_external("/etc/passwd", "/x", file_, "out", H5P_DEFAULT, H5P_DEFAULT);
  expect_refused("out/x", "link");
}

TEST_F(Foreign, GroupInsideItself) {
  H5Lcreate_hard(file_, "/", file_, "again", H5P_DEFAULT, H5P_DEFAULT);
  const Reader reader = reopen();
  EXPECT_NE(refusal([&] { reader.names(); }).find("under another name too"), std::string::npos);
}

/// Thirty groups, each linked twice from the one before: a thousand million ways to the last.
TEST_F(Foreign, GroupsLinkedInALattice) {
  std::string group;
  for (int level = 0; level < 30; ++level) {
    const std::string below = group + "/a";
    H5Gclose(H5Gcreate2(file_, below.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Lcreate_hard(file_, below.c_str(), file_, (group + "/b").c_str(), H5P_DEFAULT, H5P_DEFAULT);
    group = below;
  }
  add((group + "/x").c_str(), H5T_IEEE_F64LE, values_.data());
  const Reader reader = reopen();
  EXPECT_NE(refusal([&] { reader.names(); }).find("under another name too"), std::string::npos);
}

TEST_F(Foreign, DatasetUnderTwoNames) {
  add("x", H5T_IEEE_F64LE, values_.data());
  H5Lcreate_hard(file_, "x", file_, "y", H5P_DEFAULT, H5P_DEFAULT);
  const Reader reader = reopen();
  EXPECT_NE(refusal([&] { reader.names(); }).find("under another name too"), std::string::npos);
}

/// The type of an attribute says how many bytes it has.
TEST_F(Foreign, AttributeLargerThanTheFile) {
  const hid_t scalar = H5Screate(H5S_SCALAR), text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, 4000);
  const std::string value(4000, 'x');
  const hid_t attribute = H5Acreate2(file_, "format", text, scalar, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(attribute, text, value.data());
  H5Aclose(attribute);
  H5Tclose(text);
  H5Sclose(scalar);
  EXPECT_EQ(reopen().attribute_string("format"), value);
  std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
  std::string image((std::istreambuf_iterator<char>(file)), {});
  const std::string size{"\xa0\x0f\x00\x00", 4};
  for (size_t at = image.find(size); at != std::string::npos; at = image.find(size, at + 4)) image[at + 3] = '\x7f';
  file.clear();
  file.seekp(0);
  file.write(image.data(), static_cast<std::streamsize>(image.size()));
  file.close();
  EXPECT_NE(refusal([&] { Reader(path_).attribute_string("format"); }), "");
}

TEST_F(Foreign, ExternalStorage) {
  H5Pset_external(create_, "/etc/passwd", 0, 8000);
  add("x", H5T_IEEE_F64LE, nullptr);
  expect_refused("x", "another file");
}

TEST_F(Foreign, VirtualDataset) {
  H5Pset_virtual(create_, space_, "/etc/passwd", "/x", space_);
  add("x", H5T_IEEE_F64LE, nullptr);
  expect_refused("x", "virtual");
}

TEST_F(Foreign, Compression) {
  H5Pset_chunk(create_, 1, size_);
  H5Pset_shuffle(create_);
  add("x", H5T_IEEE_F64LE, values_.data());
  expect_refused("x", "filter 2");
}

TEST_F(Foreign, DeclaredButNotStored) {
  add("x", H5T_IEEE_F64LE, nullptr);
  expect_refused("x", "declares 8000 bytes and stores 0");
}

TEST_F(Foreign, HugeAndSparse) {
  const hsize_t huge = hsize_t{1} << 60;
  H5Sclose(space_);
  space_ = H5Screate_simple(1, &huge, nullptr);
  H5Pset_chunk(create_, 1, size_);
  add("x", H5T_IEEE_F64LE, nullptr);
  expect_refused("x", "declares an impossible size");
}

TEST_F(Foreign, OtherTypes) {
  add("x", H5T_IEEE_F64BE, values_.data());
  add("y", H5T_STD_U16LE, nullptr);
  const Reader reader = reopen();
  EXPECT_NE(refusal([&] { reader.read("x"); }).find("not of type"), std::string::npos);
  EXPECT_NE(refusal([&] { reader.dtype("y"); }).find("not of type"), std::string::npos);
}

TEST_F(Foreign, AttributesAsPythonWritesThem) {
  const hid_t scalar = H5Screate(H5S_SCALAR);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, H5T_VARIABLE);
  const char* value = "corank-tokens";
  hid_t attribute = H5Acreate2(file_, "format", text, scalar, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(attribute, text, &value);
  H5Aclose(attribute);
  const int version = 1;
  attribute = H5Acreate2(file_, "version", H5T_STD_I32LE, scalar, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(attribute, H5T_NATIVE_INT, &version);
  H5Aclose(attribute);
  attribute = H5Acreate2(file_, "many", H5T_STD_I32LE, space_, H5P_DEFAULT, H5P_DEFAULT);
  H5Aclose(attribute);
  H5Tclose(text);
  H5Sclose(scalar);
  const Reader reader = reopen();
  EXPECT_EQ(reader.attribute_string("format"), "corank-tokens");
  EXPECT_EQ(reader.attribute_int("version"), 1);
  EXPECT_NE(refusal([&] { reader.attribute_int("many"); }).find("single value"), std::string::npos);
}

}  // namespace
}  // namespace corank::h5
