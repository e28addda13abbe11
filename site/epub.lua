-- In an EPUB all chapters are one document: a link to a notebook becomes a link to a place in it.
-- Where two chapters have a place of the same name, the later one's takes its chapter's number before it.
if not FORMAT:match("epub") then
  return {}
end

local places = {} -- "6#loss" or "6" -> the identifier in the one document
local taken = {}

local function number(name)
  return (name:match("([%w]+)_[%w_]*$") or name):gsub("^0", "")
end

local function chapter_of(header)
  return pandoc.utils.stringify(header):match("^(%w+) · ")
end

local function named(chapter)
  local function rename(element)
    local id = element.identifier
    if id == nil or id == "" then
      return nil
    end
    local new = taken[id] and chapter .. "-" .. id or id
    taken[new], places[chapter .. "#" .. id] = true, new
    element.identifier = new
    return element
  end
  return { Header = rename, Div = rename, Span = rename, Code = rename, CodeBlock = rename, Image = rename, Figure = rename }
end

local function linked(chapter)
  return {
    Link = function(link)
      local file, fragment = link.target:match("^([^:#]*)%.ipynb#?(.*)$")
      if link.target:match("^[^:]*index%.qmd") then
        file, fragment = "home", ""
      end
      if file == nil and link.target:match("^#") then
        file, fragment = chapter, link.target:sub(2)
      end
      if file == nil then
        return nil
      end
      local there = number(file)
      local place = places[there .. "#" .. fragment] or places[there]
      if place == nil then
        return link.content -- not in this book: the words stay
      end
      link.target = "#" .. place
      return link
    end,
  }
end

function Pandoc(doc)
  local chapter, whose = "home", {}
  for i, block in ipairs(doc.blocks) do
    if block.t == "Header" and block.level == 1 then
      chapter = chapter_of(block) or chapter
    end
    whose[i] = chapter
    local wrapped = pandoc.Blocks({ block }):walk(named(chapter))
    doc.blocks[i] = wrapped[1]
    if block.t == "Header" and places[chapter] == nil then
      places[chapter] = wrapped[1].identifier
    end
  end
  for i, block in ipairs(doc.blocks) do
    doc.blocks[i] = pandoc.Blocks({ block }):walk(linked(whose[i]))[1]
  end
  return doc
end
